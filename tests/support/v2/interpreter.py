"""Mend Triton's interpreter where vLLM's V2 kernels trip over it."""

from __future__ import annotations

from typing import Any


def mend() -> None:
    """All of it, once the stand-in backend is in place and before vLLM's kernels are imported."""
    keep_booleans()
    provide_log1p()
    patch_language_once()
    filter_with_torch()


def keep_booleans() -> None:
    """Let a scalar comparison stay boolean when it is combined with a block.

    Triton 3.9's interpreter labels the result of `a >= 0` with the type of `a`. Broadcasting a
    scalar one goes by the label and turns the boolean into that integer type, `mask & (a >= 0)`
    becomes an integer too, and a masked store then refuses it: "mask has unsupported dtype".
    vLLM's `gumbel_sample` does just that when it caches the logits of probabilistic drafts.
    """
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_splat = InterpreterBuilder.create_splat

    def create_splat_of_booleans(self: Any, ret_ty: Any, arg: TensorHandle) -> TensorHandle:
        result = create_splat(self, ret_ty, arg)
        if np.asarray(arg.data).dtype == np.bool_:
            result.data = result.data.astype(np.bool_)
        return result

    InterpreterBuilder.create_splat = create_splat_of_booleans


def provide_log1p() -> None:
    """Give the interpreter `libdevice.log1p`, which vLLM's rejection sampler needs for the residual
    of a probabilistic draft. Triton's stub returns None outside of a compilation.
    """
    import numpy as np
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.runtime.interpreter import TensorHandle

    def log1p(x: Any) -> Any:
        # Lanes that the caller masks out afterwards may lie outside the domain.
        with np.errstate(all="ignore"):
            data = np.log1p(x.handle.data)
        return tl.core.tensor(TensorHandle(data, x.handle.dtype), x.type)

    libdevice.log1p = log1p


def patch_language_once() -> None:
    """Call device functions without adapting `triton.language` again for every call.

    The launch has adapted it; its reductions live in a module of their own that sees `tl.core`,
    which stays adapted once it is. Repeating it takes half of the interpreter's time in kernels
    made of small functions, such as vLLM's sampler.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    adapted: set[str] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = self.fn.__module__
        if module not in adapted and not any(value is tl for value in self.fn.__globals__.values()):
            interpreter._patch_lang(self.fn)
        adapted.add(module)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def filter_with_torch() -> None:
    """Let vLLM apply top-k and top-p with its own PyTorch code instead of its Triton kernel.

    The kernel loops over `tl.range`, which hands out Python integers in the interpreter, and then
    calls a tensor's method on one.
    """
    from vllm.v1.sample.ops import topk_topp_sampler

    topk_topp_sampler.HAS_TRITON = False
