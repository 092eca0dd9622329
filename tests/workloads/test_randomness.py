import numpy as np
import torch

from farcli.workloads.randomness import fresh, stream


def test_draws_walk_through_all_examples_before_any_comes_again():
    draws = [torch.cat(fresh(3, draw, 2, 100, 7)) for draw in range(15)]
    assert all(len(draw) == 14 == len(draw.unique()) for draw in draws)
    for epoch in (draws[:7], draws[7:14]):
        assert len(torch.cat(epoch).unique()) == 98
    assert not torch.equal(draws[0], draws[7])
    assert set(torch.cat(draws).tolist()) <= set(range(100))


def test_where_there_are_few_examples_there_are_fewer_or_smaller_batches():
    assert [len(batch) for batch in fresh(0, 5, 9, 20, 6)] == [6, 6, 6]
    assert [len(batch) for batch in fresh(0, 5, 9, 5, 6)] == [5]
    assert [len(batch) for batch in fresh(0, 0, 1, 1, 1)] == [1]


def test_a_numbered_part_of_a_stream_is_another_stream():
    firsts = {stream(0, "verify", *part).integers(2**62) for part in ((), (0,), (1,), (0, 0))}
    assert len(firsts) == 4
    assert np.array_equal(stream(0, "verify", 1).integers(9, size=5), stream(0, "verify", 1).integers(9, size=5))
