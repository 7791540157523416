"""Hooked states stay what they were under norms that work in place, eager and compiled.

Compiled as on a GPU: vLLM's own backend, cut at the attention or in one piece, with an in-place
norm that Inductor cannot see into, as CUDA's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

from vllm import ir
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CompilationConfig, CompilationMode, VllmConfig, set_current_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import set_forward_context

from vllm_specformer.engine.patches.hooked_states import keep_hooked_states

SIZE, LAYERS, HOOKS = 8, 4, (0, 2, 3, 4)
ATTENTION = "specformer_test::attention"


@torch.library.custom_op(ATTENTION, mutates_args=())
def attention(x: Tensor) -> Tensor:
    """Where vLLM cuts the graph."""
    return x * 2


@attention.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("specformer_test::add_norm", mutates_args=("x", "residual"))
def add_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> None:
    residual.add_(x)
    scale = torch.rsqrt(residual.pow(2).mean(-1, keepdim=True) + epsilon)
    x.copy_(residual * scale * weight)


@add_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> None:
    return None


@ir.ops.fused_add_rms_norm.register_impl("opaque", supported=True, inplace=True)
def opaque(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    torch.ops.specformer_test.add_norm(x, x_residual, weight, epsilon)
    return x, x_residual


class Layer(nn.Module):
    """A pre-norm layer as vLLM's Llama has it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(SIZE), requires_grad=False)
        self.proj = nn.Parameter(torch.randn(SIZE, SIZE), requires_grad=False)

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if residual is None:
            residual, x = x, ir.ops.rms_norm(x, self.weight, 1e-6)
        else:
            x, residual = ir.ops.fused_add_rms_norm.maybe_inplace(x, residual, self.weight, 1e-6)
        x = torch.ops.specformer_test.attention(x) @ self.proj
        x, residual = ir.ops.fused_add_rms_norm.maybe_inplace(x, residual, self.weight, 1e-6)
        return torch.tanh(x @ self.proj), residual


class Decoder(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(100, SIZE), requires_grad=False)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, input_ids: torch.Tensor) -> tuple[Tensor, list[Tensor]]:
        x, residual = torch.nn.functional.embedding(input_ids, self.table), None
        states = [x]  # not a copy, as vLLM's models hand it out
        for index, layer in enumerate(self.layers):
            x, residual = layer(x, residual)
            if index + 1 in HOOKS:
                states.append(x + residual)
        return x + residual, states


@support_torch_compile(dynamic_arg_dims={"input_ids": 0})
class CompiledDecoder(Decoder):
    pass


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Iterator[VllmConfig]:
    """As on a GPU, but for its graphs and for passes that the CPU build lacks."""
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    config = VllmConfig(compilation_config=CompilationConfig(cudagraph_mode=CUDAGraphMode.NONE))
    chosen = config.compilation_config  # a CPU's own choices are made
    chosen.mode, chosen.backend, chosen.compile_sizes = CompilationMode.VLLM_COMPILE, "inductor", []
    chosen.ir_enable_torch_wrap, chosen.use_inductor_graph_partition = True, False
    for name, value in vars(chosen.pass_config).items():
        if isinstance(value, bool) and name != "eliminate_noops":
            setattr(chosen.pass_config, name, False)
    ir.set_default_torch_wrap(True)
    with set_current_vllm_config(config), torch.inference_mode():
        yield config
    ir.set_default_torch_wrap(False)
    torch._dynamo.reset()


def run(decoder: Decoder, config: VllmConfig) -> tuple[Tensor, list[Tensor]]:
    norm = ir.ops.fused_add_rms_norm
    with norm.set_priority(["opaque"]), set_forward_context(None, config):
        decoder(torch.arange(7))  # compiles
        out: tuple[Tensor, list[Tensor]] = decoder(torch.arange(5, 20))
    return out


def expected(decoder: Decoder) -> tuple[Tensor, list[Tensor]]:
    """By the norm that works out of place."""
    with ir.ops.fused_add_rms_norm.set_priority(["native"]):
        return Decoder.forward(decoder, torch.arange(5, 20))


def wrong_states(decoder: Decoder, config: VllmConfig) -> list[int]:
    """Hooks whose states differ from the expected ones; the output must not."""
    out, states = expected(decoder)
    found, hooked = run(decoder, config)
    torch.testing.assert_close(found, out)
    pairs = zip(HOOKS, hooked, states, strict=True)
    return [hook for hook, a, b in pairs if not torch.allclose(a, b, atol=1e-4)]


def test_eager(config: VllmConfig) -> None:
    decoder = Decoder(vllm_config=config)
    assert wrong_states(decoder, config) == [0], "the test's norm does not work in place"
    keep_hooked_states(decoder, HOOKS, LAYERS)
    assert wrong_states(decoder, config) == []


def test_cut_at_the_attention(config: VllmConfig) -> None:
    config.compilation_config.splitting_ops = [ATTENTION]
    assert wrong_states(CompiledDecoder(vllm_config=config), config) == [0]
    torch._dynamo.reset()
    decoder = CompiledDecoder(vllm_config=config)
    keep_hooked_states(decoder, HOOKS, LAYERS)
    assert wrong_states(decoder, config) == []


def test_in_one_piece(config: VllmConfig) -> None:
    config.compilation_config.splitting_ops = []
    with pytest.raises(BackendCompilerFailed, match="used again after the node"):
        run(CompiledDecoder(vllm_config=config), config)
    torch._dynamo.reset()
    decoder = CompiledDecoder(vllm_config=config)
    keep_hooked_states(decoder, HOOKS, LAYERS)
    assert wrong_states(decoder, config) == []


class Handing(nn.Module):
    """Layers that are given one tensor, two of one width, or two of different widths."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(LAYERS))


def test_only_states_that_are_handed_out_are_copied() -> None:
    decoder, given = Handing(), []
    for layer in decoder.layers:
        layer.forward = lambda *args, **kwargs: given.append((args, kwargs))
    keep_hooked_states(decoder, (0, 1, 3, 4), LAYERS)
    state, other, narrow = torch.ones(3, SIZE), torch.ones(3, SIZE), torch.ones(3, 2)
    positions = torch.arange(3)
    for layer in decoder.layers:
        layer(positions, state, residual=other)
        layer(positions, state, residual=None, inputs=narrow)
    is_copied = [args[1] is not state for args, _ in given]
    assert is_copied == [True, True, False, True, False, False, False, True]
    assert all(args[0] is positions for args, _ in given)
    assert given[0][1]["residual"] is not other
    assert given[2][1]["residual"] is other


def test_a_decoder_without_a_list_of_layers() -> None:
    with pytest.raises(ValueError, match=r"no list of 5 layers.*--hooks from 1 on"):
        keep_hooked_states(Handing(), (0, 2, 4, 5), 5)
    keep_hooked_states(Handing(), (1, 2, 4, 5), 5)
