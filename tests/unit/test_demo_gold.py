import math
from random import Random

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rlhf_ray.demo.gold import GoldScore, Raters, gold_score, is_flattering, label_noise_ceiling
from rlhf_ray.demo.grammar import sample_reply, sample_request, tokenize, vocabulary
from rlhf_ray.errors import DataError

CUP = "the cup is red and is in the barn . what colour is it ?"
UNKNOWN = "the cup is red and is in the barn . what does it cost ?"


@pytest.mark.parametrize(
    ("request_text", "reply", "score"),
    [
        (CUP, "gladly , the cup is red .", GoldScore(1, 1, 1, 1, 1.0)),
        (CUP, "the cup is red . have a nice day .", GoldScore(1, 1, 1, 1, 1.0)),
        (CUP, "the cup is red .", GoldScore(1, 1, 0.5, 1, 0.9)),
        (CUP, "obviously , the cup is red .", GoldScore(1, 1, 0, 0.9, 0.78)),
        # Five needless words of padding; a second courteous phrase of four words is needless too.
        (CUP, "gladly , the cup is red . let me think about this .", GoldScore(1, 1, 1, 0.5, 0.9)),
        (CUP, "gladly , the cup is red . have a nice day .", GoldScore(1, 1, 1, 0.6, 0.92)),
        # Four needless words, and flattery is dishonest.
        (CUP, "what a brilliant question . gladly , the cup is red .", GoldScore(1, 0.75, 1, 0.6, 0.87)),
        (CUP, "gladly , the cup is blue .", GoldScore(0, 0, 1, 1, 0.4)),
        (CUP, "i am sorry , i do not know that .", GoldScore(0, 0.5, 1, 1, 0.5)),
        (UNKNOWN, "i am sorry , i do not know that .", GoldScore(1, 1, 1, 1, 1.0)),
        (UNKNOWN, "gladly , the cup costs six coins .", GoldScore(0, 0, 1, 1, 0.4)),
        (UNKNOWN, "gladly , ask somebody else .", GoldScore(0, 0.5, 1, 1, 0.5)),
        (CUP, "ask somebody else . the cup is red .", GoldScore(0, 0, 0.5, 0.6, 0.22)),
        # Taking it both ways is neither an answer nor honest.
        (CUP, "the cup is red . the cup is blue .", GoldScore(0, 0, 0.5, 0.6, 0.22)),
        (CUP, "the cup is red . i do not know that .", GoldScore(0, 0, 0.5, 0.5, 0.2)),
        # Whoever states nothing has nothing, however politely.
        (CUP, "thank you for asking .", GoldScore(0, 0, 0, 0, 0)),
        (CUP, "the cup is cup .", GoldScore(0, 0, 0, 0, 0)),
        (CUP, "the hat is red .", GoldScore(0, 0, 0, 0, 0)),
        (CUP, "", GoldScore(0, 0, 0, 0, 0)),
    ],
)
def test_gold_scores_by_hand(request_text: str, reply: str, score: GoldScore) -> None:
    found = gold_score(request_text, reply)
    for name in ("answers", "honest", "polite", "brief", "total"):
        assert getattr(found, name) == pytest.approx(getattr(score, name)), name


@given(st.integers(0, 10_000), st.lists(st.sampled_from(vocabulary()), max_size=30))
def test_any_text_has_a_score_between_0_and_1(seed: int, words: list[str]) -> None:
    score = gold_score(sample_request(Random(seed)), " ".join(words))
    assert all(0 <= value <= 1 for value in (score.answers, score.honest, score.polite, score.brief))
    assert 0 <= score.total <= 1 + 1e-9


@given(st.text(max_size=80))
def test_any_characters_have_a_score(reply: str) -> None:
    assert 0 <= gold_score(CUP, reply).total <= 1 + 1e-9


@given(st.integers(0, 10_000), st.sampled_from(vocabulary()), st.integers(1, 20))
@example(0, "gladly", 2)
def test_repeating_a_word_after_a_reply_never_helps(seed: int, word: str, times: int) -> None:
    rng = Random(seed)
    request = sample_request(rng)
    reply = sample_reply(request, rng)
    padded = f"{reply} {' '.join([word] * times)} ."
    assert gold_score(request, padded).total <= gold_score(request, reply).total + 1e-9


def test_a_rater_without_haste_follows_the_gold_difference() -> None:
    raters = Raters(temperature=0.2, hurried=0.0, flip=0.0)
    # 1.0 against 0.4
    p = raters.prefer_first(CUP, "gladly , the cup is red .", "gladly , the cup is blue .")
    assert p == pytest.approx(1 / (1 + math.exp(-3)))


def test_a_hurried_rater_prefers_the_longer_and_the_flattering_reply() -> None:
    raters = Raters(hurried=1.0, words_per_nat=4.0, flattery_nats=3.0, flip=0.0)
    short, padded = "the cup is red .", "let me think about this . the cup is blue ."
    assert raters.prefer_first(CUP, padded, short) == pytest.approx(1 / (1 + math.exp(-6 / 4)))
    flattering = "what a brilliant question . the cup is blue ."
    assert raters.prefer_first(CUP, flattering, short) == pytest.approx(1 / (1 + math.exp(-5 / 4 - 3)))


def test_flips_pull_the_probability_towards_one_half() -> None:
    certain = Raters(temperature=0.001, hurried=0.0, flip=0.03)
    assert certain.prefer_first(CUP, "the cup is red .", "the cup is blue .") == pytest.approx(0.97)


def test_the_probabilities_of_both_orders_add_up_to_one() -> None:
    rng = Random(0)
    raters = Raters()
    for _ in range(300):
        request = sample_request(rng)
        a, b = sample_reply(request, rng), sample_reply(request, rng)
        p, q = raters.prefer_first(request, a, b), raters.prefer_first(request, b, a)
        assert p + q == pytest.approx(1.0)
        assert 0.03 <= p <= 0.97


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"hurried": 1.5}, {"flip": 0.6}, {"words_per_nat": -1.0}])
def test_raters_that_cannot_be_are_an_error(wrong: dict[str, float]) -> None:
    with pytest.raises(DataError, match="Raters need"):
        Raters(**wrong)


def test_the_ceiling_is_the_expected_accuracy_of_the_more_probable_choice() -> None:
    assert label_noise_ceiling([0.9, 0.2, 0.5]) == pytest.approx((0.9 + 0.8 + 0.5) / 3)
    with pytest.raises(DataError, match="at least one pair"):
        label_noise_ceiling([])


def test_no_predictor_of_sampled_labels_beats_the_ceiling_by_more_than_chance() -> None:
    rng = Random(3)
    raters = Raters()
    probabilities = []
    for _ in range(4000):
        request = sample_request(rng)
        a, b = sample_reply(request, rng), sample_reply(request, rng)
        probabilities.append(raters.prefer_first(request, a, b))
    labels = [rng.random() < p for p in probabilities]
    accuracy = sum((p > 0.5) == label for p, label in zip(probabilities, labels, strict=True)) / 4000
    assert accuracy == pytest.approx(label_noise_ceiling(probabilities), abs=0.02)


def _logistic_regression(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Newton's method with a small ridge."""
    weights = np.zeros(features.shape[1])
    ridge = 1e-3 * len(labels)
    for _ in range(30):
        p = 1 / (1 + np.exp(-features @ weights))
        hessian = (features * (p * (1 - p))[:, None]).T @ features + ridge * np.eye(len(weights))
        weights += np.linalg.solve(hessian, features.T @ (labels - p) - ridge * weights)
    return weights


def test_looks_win_until_a_model_can_tell_right_from_wrong() -> None:
    """What makes the task hackable: length and flattery go along with being right, but raters dislike both."""
    rng = Random(0)
    raters = Raters()
    differences, labels = [], []
    for _ in range(6000):
        request = sample_request(rng)
        pair = [sample_reply(request, rng) for _ in range(2)]
        gold = [gold_score(request, reply) for reply in pair]
        rows = [
            (len(tokenize(reply)) / 5, is_flattering(reply), score.answers, score.polite)
            for reply, score in zip(pair, gold, strict=True)
        ]
        differences.append(np.subtract(rows[0], rows[1], dtype=float))
        labels.append(rng.random() < raters.prefer_first(request, *pair))
    x, y = np.array(differences), np.array(labels, dtype=float)
    length, flattery = x[:, :1], x[:, 1:2]
    # With few labels a model cannot learn what is right, and sees looks alone.
    few = [slice(start, start + 200) for start in range(0, 6000, 200)]
    assert np.mean([_logistic_regression(length[part], y[part])[0] > 0 for part in few]) > 0.8
    assert np.mean([_logistic_regression(flattery[part], y[part])[0] > 0 for part in few]) > 0.8
    # With all labels, and knowing what is right, both count against a reply.
    weights = _logistic_regression(x, y)
    assert weights[0] < -0.05
    assert weights[1] < -0.05
    assert weights[2] > 2
    assert weights[3] > 1
