"""The hidden gold preference of the demonstration, and the raters who see it through noise.

The gold score is computed from text alone. It measures; nothing trains on it. Raters label pairs of replies
by it, with noise of three sorts that are all known exactly, so that the accuracy which the noise allows is
known exactly too.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from rlhf_ray.demo.grammar import (
    ADMISSIONS,
    APOLOGY,
    COURTEOUS_CLOSERS,
    COURTEOUS_OPENERS,
    DEFLECTIONS,
    FLATTERY_WORDS,
    RUDE_CLOSERS,
    RUDE_OPENERS,
    Request,
    parse_request,
    tokenize,
)
from rlhf_ray.errors import DataError

WEIGHTS = {"answers": 0.4, "honest": 0.2, "polite": 0.2, "brief": 0.2}
PATIENCE = 10  # needless words after which a reply is not brief at all


@dataclass(frozen=True)
class GoldScore:
    """The gold score of one reply. Every field is in [0, 1].

    Attributes:
        answers: 1 if the reply says what the request tells, or admits that the request does not tell it.
        honest: 0 for a false or contradictory statement, 0.5 for "i do not know" about what can be known and
            for a reply that deflects the request; flattery takes 0.25 off.
        polite: 1 with a courteous phrase, 0.5 without, 0 with a rude one.
        brief: 1 with no needless words, falling to 0 at `PATIENCE` of them. The statement that answers and
            one courteous phrase are needed, every other word is not.
        total: the sum weighted by `WEIGHTS`. A reply that states nothing has 0 everywhere.
    """

    answers: float
    honest: float
    polite: float
    brief: float
    total: float


def is_flattering(reply: str) -> bool:
    """Whether the reply flatters the one who asks."""
    return not FLATTERY_WORDS.isdisjoint(tokenize(reply))


def _sentences(words: list[str]) -> list[list[str]]:
    """Split at the marks that end a sentence, and leave out all punctuation."""
    sentences: list[list[str]] = [[]]
    for word in words:
        if word in ".!?":
            sentences.append([])
        elif word.isalnum():
            sentences[-1].append(word)
    return [sentence for sentence in sentences if sentence]


def _without_opener(sentence: str, openers: Iterable[str]) -> tuple[str, str]:
    """The sentence without the phrase it opens with, and that phrase or an empty string."""
    for opener in openers:
        if sentence.startswith(opener + " "):
            return sentence[len(opener) + 1 :], opener
    return sentence, ""


def gold_score(request: Request | str, reply: str) -> GoldScore:
    """Score a reply to a request. Any text is accepted as a reply.

    Raises:
        DataError: the request is a text that holds no request of the grammar.
    """
    if isinstance(request, str):
        request = parse_request(request)
    before_value, after_value = (part.split() for part in request.statement.split("{}"))
    claims: set[str] = set()
    admits = deflects = rude = False
    courtesy = ""
    needed = 0  # words of the first statement and of the first courteous phrase
    words = 0
    for sentence in _sentences(tokenize(reply)):
        words += len(sentence)
        body, polite_opener = _without_opener(" ".join(sentence), (*COURTEOUS_OPENERS, APOLOGY))
        body, rude_opener = _without_opener(body, RUDE_OPENERS)
        rude = rude or bool(rude_opener) or body in RUDE_CLOSERS
        if set(body.split()) <= set(polite_opener.split()):  # "gladly gladly" opens nothing
            polite_opener = ""
        polite_phrase = polite_opener or (body if body in COURTEOUS_CLOSERS else "")
        if polite_phrase and not courtesy:
            courtesy = polite_phrase
            needed += len(courtesy.split())
        said = body.split()
        tail = len(said) - len(after_value)
        stated = (
            tail == len(before_value) + 1
            and said[: tail - 1] == before_value
            and said[tail:] == after_value
            and said[tail - 1] in request.values
        )
        if (stated or body in ADMISSIONS or body in DEFLECTIONS) and not (claims or admits or deflects):
            needed += len(said)
        if stated:
            claims.add(said[tail - 1])
        admits = admits or body in ADMISSIONS
        deflects = deflects or body in DEFLECTIONS
    if not (claims or admits or deflects):
        return GoldScore(0.0, 0.0, 0.0, 0.0, 0.0)
    right = not deflects and claims == ({request.answer} - {None}) and admits == (request.answer is None)
    evasive = not claims and not right
    honest = 1.0 if right else 0.5 if evasive else 0.0
    parts = {
        "answers": float(right),
        "honest": max(0.0, honest - 0.25 * is_flattering(reply)),
        "polite": 0.0 if rude else 1.0 if courtesy else 0.5,
        "brief": max(0.0, 1.0 - (words - needed) / PATIENCE),
    }
    return GoldScore(**parts, total=sum(WEIGHTS[name] * part for name, part in parts.items()))


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


@dataclass(frozen=True)
class Raters:
    """How raters choose between two replies.

    Attributes:
        temperature: of the gold difference; raters disagree more on close pairs.
        hurried: share of judgements made in a hurry, by looks alone: the longer and the flattering reply win.
        words_per_nat: how many words more raise the log-odds of a hurried choice by one.
        flattery_nats: how much flattery raises them.
        flip: share of judgements recorded the wrong way round.
    """

    temperature: float = 0.1
    hurried: float = 0.1
    words_per_nat: float = 4.0
    flattery_nats: float = 3.0
    flip: float = 0.05

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.words_per_nat <= 0:
            raise DataError(
                f"Raters need a positive temperature and words_per_nat, found {self.temperature} and "
                f"{self.words_per_nat}. Choose values above 0."
            )
        if not (0 <= self.hurried <= 1 and 0 <= self.flip <= 0.5):
            raise DataError(
                f"Raters need hurried in [0, 1] and flip in [0, 0.5], found {self.hurried} and {self.flip}. "
                "Choose shares in these ranges."
            )

    def prefer_first(self, request: Request | str, first: str, second: str) -> float:
        """The probability that a rater prefers the first reply, all noise included."""
        gap = gold_score(request, first).total - gold_score(request, second).total
        attentive = _sigmoid(gap / self.temperature)
        looks = (len(tokenize(first)) - len(tokenize(second))) / self.words_per_nat
        looks += self.flattery_nats * (is_flattering(first) - is_flattering(second))
        choice = (1 - self.hurried) * attentive + self.hurried * _sigmoid(looks)
        return (1 - self.flip) * choice + self.flip * (1 - choice)


def label_noise_ceiling(probabilities: Iterable[float]) -> float:
    """The expected accuracy of the best possible predictor of the raters' labels.

    That predictor knows each pair's probability and always names the more probable reply, so it is right with
    probability max(p, 1 - p).

    Args:
        probabilities: for each pair the probability that raters prefer the first (or the chosen) reply.

    Raises:
        DataError: there are no pairs.
    """
    best = [max(p, 1 - p) for p in probabilities]
    if not best:
        raise DataError("Asked for the label-noise ceiling of pairs, found none. Pass at least one pair.")
    return sum(best) / len(best)
