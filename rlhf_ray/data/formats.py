"""Dataset formats: from a row's columns to a demonstration, preference pairs or a prompt.

The formats are those of TRL ("Dataset formats and types"), told apart by value type row by row: *standard*
text is a string, *conversational* text a list of `{"role", "content"}` messages. Added to them are Alpaca's
`instruction/input/output` (Taori et al. 2023), the "\\n\\nHuman: ... \\n\\nAssistant: ..." transcripts of
HH-RLHF (Bai et al. 2022, arXiv 2204.05862), and rankings of K replies (Ouyang et al. 2022, arXiv 2203.02155,
section 3.5). A column that holds null counts as absent, because Arrow tables fill absent columns with null.
"""

import hashlib
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rlhf_ray.data.readers import MalformedRows, OnMalformed, Row
from rlhf_ray.errors import DataError, shortened

Message = dict[str, Any]
Content = str | list[Message]
T = TypeVar("T")

# Replies in a ranking: pairs grow with their square, and 256 replies make 32,640.
MOST_REPLIES = 256

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}

# Prompts of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca, train.py), for models without a chat
# template.
ALPACA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


@dataclass(frozen=True)
class Demonstration:
    """Text to imitate. Prompt and completion are both strings or both lists of messages.

    Attributes:
        prompt: what the model is given; empty when the row is one whole text or conversation.
        completion: what it learns to say: the string, or the assistant messages of the list.
        source: the row's place.
    """

    prompt: Content
    completion: Content
    source: str


@dataclass(frozen=True)
class PreferencePair:
    """Two replies to one prompt. All three are strings, or all three are lists of messages.

    Attributes:
        prompt: what both reply to.
        chosen: the preferred reply.
        rejected: the other reply.
        weight: factor on the pair's loss; the pairs of one ranking share the ranking's weight equally.
        margin: how much better the chosen reply is, in units of reward (0 when the row does not say).
        group: number of the row among the used rows; pairs of one ranking have it in common.
        source: the row's place.
    """

    prompt: Content
    chosen: Content
    rejected: Content
    weight: float
    margin: float
    group: int
    source: str


@dataclass(frozen=True)
class Prompt:
    """A prompt to reply to.

    Attributes:
        uid: hash of the content and of its position among the prompts: unique in a run, the same in the next
            run.
        content: the text or the messages.
        row: the row's other columns, for reward functions.
        source: the row's place.
        token_ids: the prompt as the engine gets it; empty until it is tokenised.
    """

    uid: str
    content: Content
    row: dict[str, Any]
    source: str
    token_ids: list[int] = field(default_factory=list)


def parse_demonstrations(
    rows: Iterable[Row], *, as_chat: bool = False, on_malformed: OnMalformed = "error"
) -> tuple[list[Demonstration], list[str]]:
    """Reads each row as a demonstration, by the first of these that it has.

    `messages`; `prompt` and `completion`; `instruction`, `input` (optional) and `output`; `text`.

    Args:
        rows: what `read_rows` returned.
        as_chat: wrap plain prompts and completions into user and assistant messages. A plain `text` has no
            turns and stays plain.
        on_malformed: "error" raises at the first malformed row, "skip" leaves it out with a message.

    Returns:
        The demonstrations, and one message for each row left out.

    Raises:
        DataError: a malformed row under "error".
    """
    return _parse(rows, lambda row, index: _demonstration(row, as_chat), on_malformed)


def parse_preferences(
    rows: Iterable[Row], *, as_chat: bool = False, on_malformed: OnMalformed = "error"
) -> tuple[list[PreferencePair], list[str]]:
    """Reads each row as one preference pair, or as a ranking that gives several.

    Pairs: `prompt`, `chosen` and `rejected`; or `chosen` and `rejected` alone, whose prompt is their common
        beginning
    (conversations: up to the last shared start of an assistant turn; strings: up to the last whitespace,
    where TRL may split a word). Rankings: `prompt`, `completions` (or `replies`) and `ranks`, 1 the best;
    every two replies of different rank make a pair, and each weighs 1 / number of pairs, so that a ranking
    counts once. A ranking of ties alone is no pair and is left out with a message, under "error" too.
    Optional columns: `weight`, `margin` (pairs only).

    Args, returns and raises as `parse_demonstrations`.
    """
    no_pair: list[str] = []

    def parse(row: Row, index: int) -> list[PreferencePair]:
        if _has(row, "ranks") and not _has(row, "chosen"):
            pairs = _ranking(row, index, as_chat)
            if not pairs:
                no_pair.append(f"{row.source}: a ranking in which all replies tie gives no pair")
            return pairs
        return [_pair(row, index, as_chat)]

    groups, skipped = _parse(rows, parse, on_malformed)
    return list(itertools.chain.from_iterable(groups)), skipped + no_pair


def parse_prompts(
    rows: Iterable[Row], *, as_chat: bool = False, on_malformed: OnMalformed = "error"
) -> tuple[list[Prompt], list[str]]:
    """Reads each row as a prompt, by the first of these that it has.

    `prompt`; `messages` that end in a user message; `instruction` and `input` (optional); the common
    beginning of `chosen` and `rejected`. The row's other columns stay in `Prompt.row`.

    Args, returns and raises as `parse_demonstrations`.
    """
    return _parse(rows, lambda row, index: _prompt(row, index, as_chat), on_malformed)


def _parse(rows: Iterable[Row], parse: Callable[[Row, int], T], on_malformed: OnMalformed) -> tuple[list[T], list[str]]:
    malformed = MalformedRows(on_malformed)
    items: list[T] = []
    for row in rows:
        try:
            items.append(parse(row, len(items)))
        except DataError as error:
            malformed.add(f"{row.source}: {error}")
    return items, malformed.messages


def _demonstration(row: Row, as_chat: bool) -> Demonstration:
    data = row.data
    if _has(row, "messages"):
        prompt, completion = _whole(_messages(data["messages"], "messages"))
    elif _has(row, "prompt", "completion"):
        prompt, completion = _prompt_and_replies(data, ["completion"], as_chat)
    elif _has(row, "instruction", "output"):
        prompt = _instruction(data, as_chat)
        completion = _text(data["output"], "output")
        if as_chat:
            completion = _as_messages(completion, "assistant")
    elif _has(row, "text"):
        text = _text(data["text"], "text")
        prompt, completion = _whole(parse_transcript(text)) if is_transcript(text) else ("", text)
    else:
        raise _unknown(row, "demonstration", "`messages`, `prompt` + `completion`, `instruction` + `output` or `text`")
    return Demonstration(prompt, completion, row.source)


def _whole(messages: list[Message]) -> tuple[Content, Content]:
    """A conversation all of whose assistant messages are learned."""
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"the conversation must end in an assistant message, found role {shortened(repr(messages[-1]['role']))}"
        )
    return [], messages


def _pair(row: Row, index: int, as_chat: bool) -> PreferencePair:
    data = row.data
    if not _has(row, "chosen", "rejected"):
        raise _unknown(row, "preference", "`chosen` + `rejected` (with or without `prompt`) or `completions` + `ranks`")
    if _has(row, "prompt"):
        prompt, chosen, rejected = _prompt_and_replies(data, ["chosen", "rejected"], as_chat)
    else:
        prompt, chosen, rejected = _implicit(data, as_chat)
    weight, margin = _number(data, "weight", 1.0), _number(data, "margin", 0.0)
    return _preference(prompt, chosen, rejected, weight, margin, index, row.source)


def _preference(prompt: Content, chosen: Content, rejected: Content, *rest: Any) -> PreferencePair:
    if chosen == rejected:
        raise DataError("the chosen and the rejected reply are the same, so there is no preference")
    return PreferencePair(prompt, chosen, rejected, *rest)


def _ranking(row: Row, index: int, as_chat: bool) -> list[PreferencePair]:
    data = row.data
    name = "completions" if _has(row, "completions") else "replies"
    if not _has(row, "prompt", name):
        raise _unknown(row, "ranking", "`prompt`, `completions` (or `replies`) and `ranks`")
    replies, ranks = data[name], data["ranks"]
    if not isinstance(replies, list) or not isinstance(ranks, list) or len(replies) != len(ranks):
        raise DataError(f"`{name}` and `ranks` must be lists of the same length")
    if len(ranks) > MOST_REPLIES:
        raise DataError(f"`{name}` has {len(replies)} replies; rank {MOST_REPLIES} at most")
    # A rank that is not itself is not a number; math.isnan would refuse whole numbers of hundreds of digits.
    if any(isinstance(rank, bool) or not isinstance(rank, int | float) or rank != rank for rank in ranks):
        raise DataError(f"`ranks` must be numbers, 1 for the best, found {shortened(ranks)}")
    if _has(row, "margin"):
        raise DataError("`margin` belongs to one pair, so a ranking cannot have it: remove the column")
    named = {f"{name}[{number}]": reply for number, reply in enumerate(replies)}
    prompt, *contents = _prompt_and_replies({"prompt": data["prompt"], **named}, list(named), as_chat)
    # Both orders of every two replies: a better rank is a smaller number, and ties fit neither order.
    order = [(a, b) for a, b in itertools.permutations(range(len(ranks)), 2) if ranks[a] < ranks[b]]
    weight = _number(data, "weight", 1.0) / max(len(order), 1)
    return [_preference(prompt, contents[a], contents[b], weight, 0.0, index, row.source) for a, b in order]


def _prompt(row: Row, index: int, as_chat: bool) -> Prompt:
    data = row.data
    used: tuple[str, ...]
    content: Content
    if _has(row, "prompt"):
        content, used = _content(data["prompt"], "prompt", "user", as_chat), ("prompt",)
    elif _has(row, "messages"):
        content, used = _messages(data["messages"], "messages"), ("messages",)
        if content[-1]["role"] == "assistant":
            raise DataError("`messages` of a prompt must end in a user message, found an assistant message at the end")
    elif _has(row, "instruction"):
        content, used = _instruction(data, as_chat), ("instruction", "input")
    elif _has(row, "chosen", "rejected"):
        content, used = _implicit(data, as_chat)[0], ()
    else:
        raise _unknown(row, "prompt", "`prompt`, `messages`, `instruction` or `chosen` + `rejected`")
    if not isinstance(content, str):
        _check_prompt_end(content)
    key = json.dumps([index, content], sort_keys=True, default=str).encode()
    rest = {name: value for name, value in data.items() if name not in used}
    return Prompt(hashlib.sha256(key).hexdigest()[:16], content, rest, row.source)


def _prompt_and_replies(data: dict[str, Any], names: list[str], as_chat: bool) -> list[Content]:
    """An explicit prompt and its replies, all strings or, where one of them is a conversation, all messages.

    A reply that repeats its prompt is reduced to what follows it.
    """
    prompt = _content(data["prompt"], "prompt", "user", as_chat)
    replies = [_content(data[name], name, "assistant", as_chat) for name in names]
    if all(isinstance(content, str) for content in [prompt, *replies]):
        return [prompt, *replies]
    messages = _as_messages(prompt, "user")
    _check_prompt_end(messages)
    results: list[Content] = [messages]
    for name, content in zip(names, replies, strict=True):
        reply = _as_messages(content, "assistant")
        if reply[: len(messages)] == messages:
            reply = reply[len(messages) :]
        _check_reply(reply, name)
        results.append(reply)
    return results


def _implicit(data: dict[str, Any], as_chat: bool) -> list[Content]:
    """Prompt, chosen and rejected from two full texts or conversations that begin alike."""
    chosen, rejected = (_content(data[name], name, "assistant", False) for name in ("chosen", "rejected"))
    if isinstance(chosen, str) and isinstance(rejected, str):
        cut = _shared_words(chosen, rejected)
        if cut == 0:
            raise DataError("`chosen` and `rejected` begin differently, so they hold no prompt: add a `prompt` column")
        data = {"prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}
        return _prompt_and_replies(data, ["chosen", "rejected"], as_chat)
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise DataError("`chosen` and `rejected` must be of one kind, found a string and a conversation")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    shared = min(shared, len(chosen) - 1, len(rejected) - 1)
    while shared > 0 and not chosen[shared]["role"] == rejected[shared]["role"] == "assistant":
        shared -= 1
    if shared == 0:
        raise DataError("`chosen` and `rejected` share no prompt before their assistant messages")
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        _check_reply(messages[shared:], name)
    return [chosen[:shared], chosen[shared:], rejected[shared:]]


def _shared_words(a: str, b: str) -> int:
    """Length of the common beginning to the end of its last whole word; without spaces, of all of it."""
    shared = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    prefix = a[:shared]
    if prefix[-1:].isspace():
        return len(prefix.rstrip())
    words = prefix.rsplit(maxsplit=1)
    return len(words[0]) if len(words) == 2 else shared


def is_transcript(text: str) -> bool:
    """Whether a string is a transcript in the form of HH-RLHF."""
    return text.startswith("\n\nHuman:") and "\n\nAssistant:" in text


def parse_transcript(text: str) -> list[Message]:
    """Splits an HH-RLHF transcript into messages.

    Consecutive turns of one speaker become one message, since many chat templates accept alternating roles
    alone. An empty assistant turn at the end is only the cue for a reply and is dropped.
    """
    parts = _TURN.split(text)[1:]
    messages: list[Message] = []
    for speaker, turns in itertools.groupby(zip(parts[::2], parts[1::2], strict=True), key=lambda turn: turn[0]):
        contents = (content.strip() for _, content in turns)
        # One join: text that is put together turn by turn is copied once for each.
        messages.append({"role": _ROLES[speaker], "content": "\n\n".join(filter(None, contents))})
    if messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    return messages


def _content(value: Any, name: str, role: str, as_chat: bool) -> Content:
    """A column's text: messages from a list or a transcript, else the string, wrapped where that is asked."""
    if isinstance(value, list):
        return _messages(value, name)
    text = _text(value, name)
    if is_transcript(text):
        return parse_transcript(text)
    return _as_messages(text, role) if as_chat else text


def _as_messages(content: Content, role: str) -> list[Message]:
    return [{"role": role, "content": content}] if isinstance(content, str) else content


def _messages(value: Any, name: str) -> list[Message]:
    """Checks a conversation and drops null keys, which Arrow tables add to messages that lack a key."""
    if not isinstance(value, list) or not value:
        raise DataError(f"`{name}` must be a list of messages that is not empty, found {_kind(value)}")
    messages = []
    for number, message in enumerate(value):
        if not isinstance(message, dict):
            raise DataError(f"`{name}[{number}]` must be an object with `role` and `content`, found {_kind(message)}")
        message = {key: item for key, item in message.items() if item is not None}
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise DataError(f"`{name}[{number}].{key}` must be a string, found {_kind(message.get(key))}")
        messages.append(message)
    if not messages[-1]["content"].strip():
        raise DataError(f"the last message of `{name}` is empty")
    return messages


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"`{name}` must be a string or a list of messages, found {_kind(value)}")
    if not value.strip():
        raise DataError(f"`{name}` is empty")
    return value


def _instruction(data: dict[str, Any], as_chat: bool) -> Content:
    """An Alpaca row's prompt: a user message, or the text of Alpaca's own prompt."""
    instruction = _text(data["instruction"], "instruction")
    extra = data.get("input") or ""
    if not isinstance(extra, str):
        raise DataError(f"`input` must be a string, found {_kind(extra)}")
    if as_chat:
        return _as_messages(f"{instruction}\n\n{extra}" if extra.strip() else instruction, "user")
    template = ALPACA_PROMPT_WITH_INPUT if extra.strip() else ALPACA_PROMPT
    return template.format(instruction=instruction, input=extra)


def _number(data: dict[str, Any], name: str, default: float) -> float:
    value = data.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise DataError(f"`{name}` must be a finite number, found {shortened(repr(value))}")
    if name == "weight" and value < 0:
        raise DataError(f"`weight` must not be negative, found {shortened(repr(value))}")
    return float(value)


def _check_prompt_end(messages: list[Message]) -> None:
    if messages[-1]["role"] == "system":
        raise DataError("a prompt must end in a user or assistant message, found a system message at the end")


def _check_reply(messages: list[Message], name: str) -> None:
    if not messages or messages[0]["role"] != "assistant" or messages[-1]["role"] != "assistant":
        roles = [message["role"] for message in messages]
        raise DataError(
            f"`{name}` must begin and end in an assistant message after the prompt, found roles {shortened(roles)}"
        )
    if not messages[-1]["content"].strip():
        raise DataError(f"`{name}` is empty")


def _has(row: Row, *names: str) -> bool:
    return all(row.data.get(name) is not None for name in names)


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    return "an empty list" if value == [] else type(value).__name__


def _unknown(row: Row, what: str, formats: str) -> DataError:
    return DataError(
        f"no {what} in columns {shortened(', '.join(row.data), 500) or '(none)'}: it needs {formats}; name columns "
        "that are called otherwise in `data.columns`"
    )
