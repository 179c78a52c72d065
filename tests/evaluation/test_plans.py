"""Different plans from one start, on a made world: a bright square that goes where the plan says."""

import pytest
import torch

from cosmos_hf.evaluation.plans import evaluate_plans, shared_starts

WAYS = {"left": -1, "right": 1, "stay": 0}


def video(way):
    frames = torch.full((3, 5, 16, 32), 40, dtype=torch.uint8)
    for t in range(5):
        frames[:, t, 4:10, 12 + 2 * way * t : 18 + 2 * way * t] = 220
    return frames


@pytest.fixture
def samples():
    """Two starts with three plans each."""
    records = [{"plan": plan, "scene": {"number": start}} for start in range(2) for plan in WAYS]
    return [{"video": video(WAYS[record["plan"]]), "record": record} for record in records]


def follows(samples):
    return lambda sample, plan, seed: samples[plan]["video"].float() / 127.5 - 1


def test_a_model_that_follows_differs_as_the_truth_does(samples):
    assert shared_starts(samples) == [[0, 1, 2], [3, 4, 5]]
    figures = evaluate_plans(follows(samples), samples)
    assert (figures["starts"], figures["plans"]) == (2, 3) and figures["true"]["mean"] > 0.05
    assert figures["generated"] == figures["true"] and figures["ratio"]["mean"] == pytest.approx(1)
    assert figures["own_future"]["mean"] == 1
    assert evaluate_plans(follows(samples), samples, num_plans=2)["plans"] == 2


def test_a_model_that_ignores_plans_and_one_that_takes_the_wrong_ones(samples):
    same = evaluate_plans(lambda sample, plan, seed: sample["video"].float() / 127.5 - 1, samples)
    assert same["generated"]["mean"] == same["ratio"]["mean"] == 0
    assert same["own_future"]["mean"] == pytest.approx(1 / 3)  # chance
    other = evaluate_plans(
        lambda *given: follows(samples)(given[0], given[1] // 3 * 3 + (given[1] + 1) % 3, 0), samples
    )
    assert other["ratio"]["mean"] == pytest.approx(1) and other["own_future"]["mean"] == 0


def test_clips_without_a_common_start_exchange_their_plans(samples):
    calls = []

    def generate(sample, plan, seed):
        calls.append((seed, plan))
        return follows(samples)(sample, plan, seed)

    alone = [sample | {"record": {}} for sample in samples[:3]]
    figures = evaluate_plans(generate, alone, num_plans=2)
    assert calls == [(0, 0), (0, 1), (1, 1), (1, 2), (2, 2), (2, 0)]
    assert figures["starts"] == 3 and set(figures) == {"starts", "plans", "generated", "true_motion", "ratio"}
    still = [{"video": video(0), "record": {}}] * 2
    assert evaluate_plans(follows(still), still)["ratio"]["mean"] == 0  # nothing moves, and nothing is divided by it
    with pytest.raises(ValueError, match="take at least two clips and two plans"):
        evaluate_plans(generate, alone[:1])
