"""What vLLM's own bars tell about the answers."""

from __future__ import annotations

from vllm_specformer.distill.offline import _forward_to


class Counter:
    answers = 0

    def answered(self, answers: int, tokens: int, speed: str | None = None) -> None:
        self.answers += answers


def test_only_finished_answers_count() -> None:
    """vLLM makes two bars of the same class: one over the prompts to render, one over answers."""
    counter = Counter()
    make_bar = _forward_to(counter)
    assert list(make_bar(range(50), mininterval=0, miniters=1)) == list(range(50))
    assert counter.answers == 0
    bar = make_bar(total=50)
    bar.update(20)
    bar.update(30)
    assert counter.answers == 50
