"""From text and conversations to token ids and targets, with the chat template applied once.

Conversations are rendered by the tokenizer's chat template and tokenised without further special tokens,
because the template writes those it wants; plain strings are tokenised with the special tokens that the
tokenizer adds. Rendering the prompt for generation and rendering the whole example must agree: the prompt's
tokens must be the first tokens of the example's, or what is trained is not what is sampled later. Every
example is checked for that, and tokenised in pieces where a token would cross the border.
"""

import itertools
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from rlhf_ray.data.formats import Content, Message
from rlhf_ray.errors import DataError, ModelError

logger = logging.getLogger(__name__)

# Special tokens of models made from scratch; <|end|> is their end-of-sequence token.
CHAT_SPECIAL_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

# Turns are closed by the tokenizer's own end-of-sequence token, so that the template also fits a base model
# which lacks the tokens above: it sees the role markers as text.
DEFAULT_CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('the role must be system, user or assistant, found ' + message['role']) -}}
{%- endif -%}
{{- '<|' + message['role'] + '|>' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + eos_token -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""

_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Encoded:
    """Token ids and which of them are targets, both of the same length; the first token is no target."""

    ids: list[int]
    targets: list[bool]

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the first target."""
        return self.targets.index(True)


@dataclass(frozen=True)
class _Rendered:
    """An example's text.

    Attributes:
        text: the whole text.
        spans: start and end of what is learned, in characters.
        templated: whether a chat template wrote it, special tokens included.
    """

    text: str
    spans: list[tuple[int, int]]
    templated: bool


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase, template_path: str | None = None) -> None:
    """Gives a tokenizer without chat template the one in a file; a template of its own is kept.

    Args:
        tokenizer: changed in place, and thus saved with the model later.
        template_path: a Jinja file, or "default" for `DEFAULT_CHAT_TEMPLATE`; None changes nothing.

    Raises:
        ModelError: the file cannot be read, or it does not render a user message.
    """
    if template_path is None:
        return
    if tokenizer.chat_template:
        logger.warning("the tokenizer has a chat template of its own; %s is not used", template_path)
        return
    template = DEFAULT_CHAT_TEMPLATE
    if template_path != "default":
        try:
            template = Path(template_path).expanduser().read_text(encoding="utf-8")
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(f"`model.chat_template` {template_path} cannot be read: {error}") from error
    tokenizer.chat_template = template
    try:
        render_prompt(tokenizer, [{"role": "user", "content": "a"}])
    except (DataError, ModelError) as error:
        tokenizer.chat_template = None
        raise ModelError(f"`model.chat_template` {template_path} renders no user message: {error}") from error


def end_of_sequence(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the end-of-sequence token.

    Raises:
        ModelError: the tokenizer has none, so that no reply could learn to end.
    """
    token = tokenizer.eos_token_id
    if not isinstance(token, int):
        raise ModelError(
            "the tokenizer has no end-of-sequence token, so a model trained with it could not end a reply: "
            "set `eos_token` in its tokenizer_config.json"
        )
    return token


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    """The text that a model continues: an assistant turn is opened, or the last one is left open.

    Raises:
        ModelError: the tokenizer has no chat template.
        DataError: the template refuses the messages.
    """
    left_open = messages[-1]["role"] == "assistant"
    return _render(tokenizer, messages, add_generation_prompt=not left_open, continue_final_message=left_open)


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Content]) -> list[list[int] | DataError]:
    """Token ids of prompts, each as the model is to continue it, or what is wrong with it.

    Raises:
        ModelError: the tokenizer lacks a chat template that a conversation needs.
    """
    rendered: list[_Rendered | DataError] = []
    for prompt in prompts:
        try:
            text = prompt if isinstance(prompt, str) else render_prompt(tokenizer, prompt)
            rendered.append(_Rendered(text, [], not isinstance(prompt, str)))
        except DataError as error:
            rendered.append(error)
    good = [item for item in rendered if isinstance(item, _Rendered)]
    ids = _tokenise(tokenizer, ((item.text, item.templated) for item in good))
    empty = DataError("the prompt has no token")
    return [item if isinstance(item, DataError) else ids[item.text, item.templated] or empty for item in rendered]


def encode_examples(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[tuple[Content, Content]]
) -> list[Encoded | DataError]:
    """Token ids and targets of examples given as (prompt, completion), or what is wrong with each.

    Of a conversation, the assistant messages of the completion are targets: what the template encloses in
    `{% generation %}` where it does, else what it writes between the opening of the turn and its end. Of
    strings, the completion is. The last target is the end-of-sequence token, which is appended where the
    template did not write it; what a template writes after it (a newline, in ChatML) is left out, for
    sampling has stopped there.

    Raises:
        ModelError: the tokenizer lacks an end-of-sequence token, or a template that a conversation needs.
    """
    eos = end_of_sequence(tokenizer)
    rendered: list[_Rendered | DataError] = []
    for prompt, completion in examples:
        try:
            rendered.append(_render_example(tokenizer, prompt, completion))
        except DataError as error:
            rendered.append(error)
    good = [item for item in rendered if isinstance(item, _Rendered)]
    texts = ((text, item.templated) for item in good for text in [item.text, *_prefixes(item)])
    ids = _tokenise(tokenizer, texts)
    return [item if isinstance(item, DataError) else _encode(tokenizer, item, ids, eos) for item in rendered]


def _prefixes(item: _Rendered) -> list[str]:
    """The beginnings of the text whose token counts locate its spans."""
    return [item.text[:end] for span in item.spans for end in span if end < len(item.text)]


def _tokenise(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[tuple[str, bool]]
) -> dict[tuple[str, bool], list[int]]:
    """Token ids of (text, templated), each distinct text once and in one batch."""
    wanted = list(dict.fromkeys(texts))
    result: dict[tuple[str, bool], list[int]] = {}
    for templated in (True, False):
        batch = [text for text, flag in wanted if flag is templated]
        if not batch:
            continue
        ids = tokenizer(
            batch,
            add_special_tokens=not templated,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # lengths are checked against the configuration, not the tokenizer's maximum
        )["input_ids"]
        if not templated:
            added = _added_at_end(tokenizer)
            ids = [tokens[: len(tokens) - added] for tokens in ids]
        result.update(zip(((text, templated) for text in batch), ids, strict=True))
    return result


def _added_at_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many special tokens the tokenizer puts behind a text: none, or an end-of-sequence token (T5)."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if bare and full[start : start + len(bare)] == bare:
            return len(full) - len(bare) - start
    return 0


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise ModelError(
            "the data are conversations and the tokenizer has no chat template: set `model.chat_template` to "
            "a Jinja file or to `default`"
        )
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:  # several templates, none of them called default
        raise ModelError(f"which of the tokenizer's chat templates to use is unclear: {error}") from error


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], **flags: Any) -> str:
    return _render_marked(tokenizer, messages, **flags)[0]


def _render_marked(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], **flags: Any
) -> tuple[str, list[tuple[int, int]]]:
    """The template's text and, with `return_assistant_tokens_mask`, what its markers enclose, in characters.

    This is `apply_chat_template(tokenize=False)`, which keeps the spans to itself. Its own token mask is not
    used: where a marker ends in a character that no token covers, it marks all that follows.
    """
    template = _template(tokenizer)
    variables: dict[str, Any] = {**tokenizer.special_tokens_map, **flags}
    try:
        result = render_jinja_template([messages], chat_template=template, **variables)
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        raise DataError(f"the chat template refuses the conversation: {error}") from error
    texts, spans = cast(tuple[list[str], list[list[tuple[int, int]]]], result)
    return texts[0], spans[0] if spans else []


def _render_example(tokenizer: PreTrainedTokenizerBase, prompt: Content, completion: Content) -> _Rendered:
    if isinstance(prompt, str) or isinstance(completion, str):
        text = f"{prompt}{completion}"
        return _Rendered(text, [(len(prompt), len(text))], templated=False)
    if prompt and prompt[-1]["role"] == "assistant":
        return _render_continued(tokenizer, prompt, completion)
    messages = [*prompt, *completion]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    first = sum(message["role"] == "assistant" for message in prompt)
    if _GENERATION_MARKER.search(_template(tokenizer)):
        text, spans = _render_marked(tokenizer, messages, return_assistant_tokens_mask=True)
        if len(spans) != len(turns):
            raise DataError(
                f"the chat template marks {len(spans)} generations where the conversation has {len(turns)} "
                "assistant messages"
            )
        return _Rendered(text, spans[first:], templated=True)
    text = _render(tokenizer, messages)
    spans = [_turn_span(tokenizer, messages, turn, text) for turn in turns[first:]]
    return _Rendered(text, spans, templated=True)


def _turn_span(tokenizer: PreTrainedTokenizerBase, messages: list[Message], turn: int, text: str) -> tuple[int, int]:
    """Where a template without markers writes an assistant message: all that it adds to the turn's prompt."""
    if turn == 0:
        raise DataError("a conversation must not begin with an assistant message")
    before = _render(tokenizer, messages[:turn], add_generation_prompt=True)
    through = _render(tokenizer, messages[: turn + 1])
    if not through.startswith(before) or not text.startswith(through):
        raise DataError(
            "the chat template is not prefix-preserving: the text of the first messages changes when more "
            "follow, so the assistant's part is unknown; use a template with {% generation %} markers"
        )
    return len(before), len(through)


def _render_continued(
    tokenizer: PreTrainedTokenizerBase, prompt: list[Message], completion: list[Message]
) -> _Rendered:
    """A prompt that ends inside an assistant message: the completion's first message is the rest of it."""
    if len(completion) != 1:
        raise DataError("a prompt that ends in an assistant message is completed by one assistant message")
    before = render_prompt(tokenizer, prompt)
    whole = {**prompt[-1], "content": prompt[-1]["content"] + completion[0]["content"]}
    text = _render(tokenizer, [*prompt[:-1], whole])
    if not text.startswith(before):
        raise DataError("the chat template changes the prompt's last assistant message when more follows it")
    return _Rendered(text, [(len(before), len(text))], templated=True)


def _locate(
    tokenizer: PreTrainedTokenizerBase, item: _Rendered, tokens: dict[tuple[str, bool], list[int]]
) -> tuple[list[int], list[tuple[int, int]]]:
    """The example's token ids and its spans in tokens.

    Where a token would cross the border of a span, the text is tokenised in pieces cut at the borders, so
    that the prompt's tokens are those that the prompt alone has.
    """
    ids = tokens[item.text, item.templated]
    cuts = [i for span in item.spans for i in span]
    prefixes = [ids if i == len(item.text) else tokens[item.text[:i], item.templated] for i in cuts]
    ends = [len(prefix) for prefix in prefixes]
    if any(ids[:end] != prefix for end, prefix in zip(ends, prefixes, strict=True)):
        pieces = [item.text[i:j] for i, j in itertools.pairwise([*cuts, len(item.text)])]
        split = _tokenise(tokenizer, ((piece, True) for piece in pieces))
        ids, ends = list(prefixes[0]), []
        for piece in pieces:
            ends.append(len(ids))
            ids += split[piece, True]
    return ids, list(zip(ends[::2], ends[1::2], strict=True))


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    item: _Rendered,
    tokens: dict[tuple[str, bool], list[int]],
    eos: int,
) -> Encoded | DataError:
    """Sets the targets and lets each span end with its end-of-sequence token."""
    ids, spans = _locate(tokenizer, item, tokens)
    targets = [False] * len(ids)
    start = end = 0
    for start, end in spans:
        inside = [i for i in range(start, end) if ids[i] == eos]
        if inside:
            end = inside[-1] + 1
        elif ids[end : end + 1] == [eos]:  # markers that leave the end of the turn outside
            end += 1
        targets[start:end] = [True] * (end - start)
    return _ended(ids, targets, start, end, eos)


def _ended(ids: list[int], targets: list[bool], start: int, end: int, eos: int) -> Encoded | DataError:
    """Cuts or extends an example whose last span is [start, end) so that its last token ends the sequence."""
    if end == start or ids[end - 1] != eos:
        rest = ids[end:]
        if eos not in rest:
            ids, rest = [*ids, eos], [*rest, eos]
        end += rest.index(eos) + 1
        targets = [*targets[:start], *[True] * (end - start)]
    ids, targets = ids[:end], targets[:end]
    targets[0] = False
    if not any(targets):
        return DataError("neither prompt nor completion has a token")
    return Encoded(ids, targets)
