"""What is asked once stays so where torch compiles."""

import warnings

import pytest
import torch

from optimum_freeact.kernels.asked_once import asked_once


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_code_takes_the_answer_and_asks_no_more():
    asked = []

    @asked_once
    def sign(index):
        """Of an index."""
        asked.append(index)
        return 1 if index else -1

    compiled = torch.compile(lambda x: x * sign(3), fullgraph=True, backend="eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lru_cache")  # torch says so where it traces a cached function
        for shape in ((2,), (3,), (2, 2)):  # compiled anew
            assert torch.equal(compiled(torch.ones(shape)), torch.ones(shape))
    assert sign(3) == 1
    assert asked == [3]
    assert sign(0) == -1
    sign.cache_clear()
    assert sign(3) == 1
    assert asked == [3, 0, 3]
    assert sign.__doc__ == "Of an index."


def test_an_error_is_not_remembered():
    answers = iter([RuntimeError("full"), 7])

    @asked_once
    def answer():
        found = next(answers)
        if isinstance(found, Exception):
            raise found
        return found

    with pytest.raises(RuntimeError, match="full"):
        answer()
    assert answer() == answer() == 7
