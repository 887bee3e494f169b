"""Dataset formats: what each kind of row becomes, and what is said of rows that fit none."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.data.formats import (
    PreferencePair,
    parse_demonstrations,
    parse_preferences,
    parse_prompts,
    parse_transcript,
)
from rlhf_ray.data.readers import Row
from rlhf_ray.errors import DataError


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


SYSTEM = {"role": "system", "content": "be brief"}


def rows(*data):
    return [Row(item, f"f.jsonl:{number}") for number, item in enumerate(data, start=1)]


def demonstration(data, as_chat=False):
    (item,), skipped = parse_demonstrations(rows(data), as_chat=as_chat)
    assert (item.source, skipped) == ("f.jsonl:1", [])
    return item.prompt, item.completion


def preference(data, as_chat=False):
    (item,), skipped = parse_preferences(rows(data), as_chat=as_chat)
    assert (item.source, item.group, skipped) == ("f.jsonl:1", 0, [])
    return item.prompt, item.chosen, item.rejected


def prompt(data, as_chat=False):
    (item,), _ = parse_prompts(rows(data), as_chat=as_chat)
    return item.content, item.row


# Demonstrations


def test_messages_are_learned_whole():
    messages = [SYSTEM, user("hi"), assistant("bye")]
    assert demonstration({"messages": messages}) == ([], messages)


def test_null_keys_of_arrow_messages_are_dropped():
    messages = [user("hi"), assistant("bye") | {"name": None}]
    assert demonstration({"messages": messages, "prompt": None}) == ([], [user("hi"), assistant("bye")])


def test_strings_stay_strings_unless_wrapped():
    row = {"prompt": "hi", "completion": " bye"}
    assert demonstration(row) == ("hi", " bye")
    assert demonstration(row, as_chat=True) == ([user("hi")], [assistant(" bye")])


def test_conversational_prompt_and_completion():
    row = {"prompt": [SYSTEM, user("hi")], "completion": [assistant("bye")]}
    assert demonstration(row) == ([SYSTEM, user("hi")], [assistant("bye")])


def test_string_beside_a_conversation_becomes_a_message():
    assert demonstration({"prompt": [user("hi")], "completion": "bye"}) == ([user("hi")], [assistant("bye")])
    assert demonstration({"prompt": "hi", "completion": [assistant("bye")]}) == (
        [user("hi")],
        [assistant("bye")],
    )


def test_text_has_no_prompt_and_stays_plain():
    assert demonstration({"text": "once upon"}) == ("", "once upon")
    assert demonstration({"text": "once upon"}, as_chat=True) == ("", "once upon")


def test_text_that_is_a_transcript_is_a_conversation():
    row = {"text": "\n\nHuman: hi\n\nAssistant: bye"}
    assert demonstration(row) == ([], [user("hi"), assistant("bye")])


def test_alpaca_as_chat_joins_instruction_and_input():
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert demonstration(row, as_chat=True) == ([user("Add.\n\n1 2")], [assistant("3")])
    assert demonstration(row | {"input": ""}, as_chat=True) == ([user("Add.")], [assistant("3")])
    del row["input"]
    assert demonstration(row, as_chat=True) == ([user("Add.")], [assistant("3")])


def test_alpaca_as_text_uses_alpacas_prompt():
    text, completion = demonstration({"instruction": "Add {x}.", "input": "1 2", "output": "3"})
    assert text.endswith("request.\n\n### Instruction:\nAdd {x}.\n\n### Input:\n1 2\n\n### Response:")
    assert completion == "3"
    text, _ = demonstration({"instruction": "Add.", "output": "3"})
    assert text.endswith("request.\n\n### Instruction:\nAdd.\n\n### Response:")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (
            {"question": "q", "answer": "a"},
            "no demonstration in columns question, answer: it needs `messages`",
        ),
        ({}, r"no demonstration in columns \(none\)"),
        ({"messages": []}, "found an empty list"),
        ({"messages": "hi"}, "found str"),
        ({"messages": ["hi"]}, r"`messages\[0\]` must be an object"),
        ({"messages": [{"content": "hi"}]}, r"`messages\[0\].role` must be a string, found nothing"),
        ({"messages": [user(["hi"])]}, r"`messages\[0\].content` must be a string, found list"),
        ({"messages": [user("hi")]}, "must end in an assistant message, found role 'user'"),
        ({"messages": [user("hi"), assistant(" ")]}, "last message of `messages` is empty"),
        ({"prompt": "hi", "completion": ""}, "`completion` is empty"),
        ({"prompt": "hi", "completion": 3}, "`completion` must be a string or a list of messages, found int"),
        ({"prompt": [user("hi")], "completion": [user("bye")]}, r"found roles \['user'\]"),
        ({"prompt": [SYSTEM], "completion": "bye"}, "found a system message at the end"),
        ({"instruction": "x", "input": 3, "output": "y"}, "`input` must be a string, found int"),
        ({"text": "  \n"}, "`text` is empty"),
    ],
)
def test_malformed_demonstration_names_place_and_reason_in_both_modes(data, reason):
    good = {"text": "once"}
    with pytest.raises(DataError, match=rf"^f\.jsonl:2: .*{reason}"):
        parse_demonstrations(rows(good, data, good))
    items, skipped = parse_demonstrations(rows(good, data, good), on_malformed="skip")
    assert [item.source for item in items] == ["f.jsonl:1", "f.jsonl:3"]
    assert len(skipped) == 1
    assert skipped[0].startswith("f.jsonl:2: ")


# Preferences


def test_explicit_strings():
    row = {"prompt": "hi", "chosen": "a", "rejected": "b"}
    assert preference(row) == ("hi", "a", "b")
    assert preference(row, as_chat=True) == ([user("hi")], [assistant("a")], [assistant("b")])


def test_explicit_conversations():
    row = {"prompt": [user("hi")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    assert preference(row) == ([user("hi")], [assistant("a")], [assistant("b")])


@pytest.mark.parametrize("text", ["hi", [user("hi")]])
def test_replies_that_repeat_their_prompt_are_reduced_to_the_reply(text):
    row = {"prompt": text, "chosen": [user("hi"), assistant("a")], "rejected": [user("hi"), assistant("b")]}
    assert preference(row) == ([user("hi")], [assistant("a")], [assistant("b")])


def test_implicit_prompt_of_conversations_is_their_common_beginning():
    start = [SYSTEM, user("hi"), assistant("yes"), user("and")]
    row = {"chosen": [*start, assistant("a")], "rejected": [*start, assistant("b")]}
    assert preference(row) == (start, [assistant("a")], [assistant("b")])


def test_implicit_prompt_ends_before_an_assistant_turn_that_both_share():
    row = {
        "chosen": [user("hi"), assistant("yes"), user("one"), assistant("a")],
        "rejected": [user("hi"), assistant("yes"), user("two"), assistant("b")],
    }
    assert preference(row) == ([user("hi")], row["chosen"][1:], row["rejected"][1:])
    longer = {"chosen": [user("hi"), assistant("yes")], "rejected": row["rejected"]}
    assert preference(longer) == ([user("hi")], [assistant("yes")], row["rejected"][1:])


def test_implicit_prompt_of_strings_splits_no_word():
    row = {"chosen": "the sky is blue", "rejected": "the sky is black"}
    assert preference(row) == ("the sky is", " blue", " black")
    assert preference({"chosen": "the sky", "rejected": "the sky is"}) == ("the", " sky", " sky is")
    assert preference(row, as_chat=True)[0] == [user("the sky is")]


def test_transcripts_become_messages():
    start = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: how are you\n\nAssistant:"
    messages = [user("hi"), assistant("yes?"), user("how are you")]
    row = {"chosen": f"{start} fine", "rejected": f"{start} bad\nreally"}
    assert preference(row) == (messages, [assistant("fine")], [assistant("bad\nreally")])
    explicit = {"prompt": start, "chosen": "fine", "rejected": "bad"}
    assert preference(explicit) == (messages, [assistant("fine")], [assistant("bad")])


def test_transcripts_that_part_earlier_share_the_last_common_assistant_turn():
    row = {
        "chosen": "\n\nHuman: hi\n\nAssistant: one\n\nHuman: x\n\nAssistant: a",
        "rejected": "\n\nHuman: hi\n\nAssistant: two\n\nHuman: y\n\nAssistant: b",
    }
    chosen = [assistant("one"), user("x"), assistant("a")]
    assert preference(row) == ([user("hi")], chosen, [assistant("two"), user("y"), assistant("b")])


def test_consecutive_turns_of_one_speaker_are_one_message():
    assert parse_transcript("\n\nHuman: hi\n\nHuman: there\n\nAssistant: a\n\nb\n\nAssistant:") == [
        user("hi\n\nthere"),
        assistant("a\n\nb"),
    ]


def test_weight_and_margin_are_read():
    data = {"prompt": "hi", "chosen": "a", "rejected": "b"}
    items, _ = parse_preferences(rows(data, data | {"weight": 2, "margin": 0.5}))
    assert [(item.weight, item.margin, item.group) for item in items] == [(1.0, 0.0, 0), (2.0, 0.5, 1)]


def test_ranking_gives_all_pairs_of_different_rank_and_counts_once():
    ranking = {"prompt": "hi", "completions": ["a", "b", "c"], "ranks": [2, 1, 2]}
    items, skipped = parse_preferences(rows({"prompt": "hi", "chosen": "x", "rejected": "y"}, ranking))
    assert skipped == []
    assert items[1:] == [
        PreferencePair("hi", "b", "a", 0.5, 0.0, 1, "f.jsonl:2"),
        PreferencePair("hi", "b", "c", 0.5, 0.0, 1, "f.jsonl:2"),
    ]


@settings(deadline=None)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=7), st.sampled_from(["completions", "replies"]))
def test_weights_of_a_ranking_sum_to_one(ranks, name):
    replies = [f"reply {number}" for number in range(len(ranks))]
    items, skipped = parse_preferences(rows({"prompt": "hi", name: replies, "ranks": ranks}))
    better = {(a, b) for a, x in zip(replies, ranks, strict=True) for b, y in zip(replies, ranks, strict=True) if x < y}
    assert {(item.chosen, item.rejected) for item in items} == better
    assert len(items) == len(better)
    if better:
        assert sum(item.weight for item in items) == pytest.approx(1.0)
    else:
        assert skipped == ["f.jsonl:1: a ranking in which all replies tie gives no pair"]


def test_ranking_as_chat_and_its_weight():
    row = {"prompt": "hi", "replies": ["a", "b", "c"], "ranks": [1, 2, 3], "weight": 6}
    items, _ = parse_preferences(rows(row), as_chat=True)
    assert [(item.chosen, item.rejected) for item in items] == [
        ([assistant("a")], [assistant("b")]),
        ([assistant("a")], [assistant("c")]),
        ([assistant("b")], [assistant("c")]),
    ]
    assert {item.weight for item in items} == {2.0}
    assert items[0].prompt == [user("hi")]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"prompt": "hi", "chosen": "a"}, "no preference in columns prompt, chosen"),
        ({"prompt": "hi", "chosen": "a", "rejected": "a"}, "are the same"),
        ({"prompt": "hi", "chosen": "a", "rejected": ""}, "`rejected` is empty"),
        ({"chosen": "a b", "rejected": "b a"}, "begin differently"),
        ({"chosen": [user("x"), assistant("a")], "rejected": "b"}, "a string and a conversation"),
        (
            {"chosen": [user("x"), assistant("a")], "rejected": [user("y"), assistant("a")]},
            "share no prompt",
        ),
        (
            {"chosen": [user("x"), assistant("a"), user("y")], "rejected": [user("x"), assistant("b")]},
            "roles",
        ),
        ({"prompt": "hi", "chosen": "a", "rejected": "b", "weight": -1}, "`weight` must not be negative"),
        ({"prompt": "hi", "chosen": "a", "rejected": "b", "margin": "x"}, "`margin` must be a finite number"),
        (
            {"prompt": "hi", "chosen": "a", "rejected": "b", "margin": float("nan")},
            "`margin` must be a finite number",
        ),
        ({"completions": ["a", "b"], "ranks": [1, 2]}, "no ranking in columns"),
        ({"prompt": "hi", "completions": ["a"], "ranks": [1, 2]}, "lists of the same length"),
        ({"prompt": "hi", "completions": ["a", "b"], "ranks": [1, "x"]}, "`ranks` must be numbers"),
        ({"prompt": "hi", "completions": ["a", ""], "ranks": [1, 2]}, r"`completions\[1\]` is empty"),
        ({"prompt": "hi", "completions": ["a", "a"], "ranks": [1, 2]}, "are the same"),
        ({"prompt": "hi", "completions": ["a", "b"], "ranks": [1, 2], "margin": 1}, "belongs to one pair"),
    ],
)
def test_malformed_preference_names_place_and_reason_in_both_modes(data, reason):
    good = {"prompt": "hi", "chosen": "a", "rejected": "b"}
    with pytest.raises(DataError, match=rf"^f\.jsonl:2: .*{reason}"):
        parse_preferences(rows(good, data, good))
    items, skipped = parse_preferences(rows(good, data, good), on_malformed="skip")
    assert [(item.source, item.group) for item in items] == [("f.jsonl:1", 0), ("f.jsonl:3", 1)]
    assert len(skipped) == 1


# Prompts


def test_prompt_keeps_the_other_columns_for_reward_functions():
    row = {"prompt": "1+1", "answer": 2}
    assert prompt(row) == ("1+1", {"answer": 2})
    assert prompt(row, as_chat=True) == ([user("1+1")], {"answer": 2})


def test_prompt_from_messages_instruction_transcript_and_preferences():
    assert prompt({"messages": [SYSTEM, user("hi")]}) == ([SYSTEM, user("hi")], {})
    alpaca = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert prompt(alpaca, as_chat=True) == ([user("Add.\n\n1 2")], {"output": "3"})
    assert prompt({"prompt": "\n\nHuman: hi\n\nAssistant:"}) == ([user("hi")], {})
    pair = {"chosen": [user("hi"), assistant("a")], "rejected": [user("hi"), assistant("b")]}
    assert prompt(pair) == ([user("hi")], pair)


def test_prompt_may_end_inside_an_assistant_message():
    messages = [user("hi"), assistant("well")]
    assert prompt({"prompt": messages}) == (messages, {})


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"messages": [user("hi"), assistant("a")]}, "must end in a user message"),
        ({"prompt": [SYSTEM]}, "found a system message at the end"),
        ({"prompt": ""}, "`prompt` is empty"),
        ({"question": "q"}, "no prompt in columns question"),
    ],
)
def test_malformed_prompt_names_place_and_reason(data, reason):
    with pytest.raises(DataError, match=rf"^f\.jsonl:1: .*{reason}"):
        parse_prompts(rows(data))


def test_uids_are_unique_for_equal_prompts_and_the_same_in_the_next_run():
    data: list[dict] = [{"prompt": "hi", "id": 1}, {"prompt": "hi", "id": 2}, {"prompt": "bye"}]
    first, _ = parse_prompts(rows(*data))
    again, _ = parse_prompts([Row(item, "elsewhere") for item in data])
    assert len({item.uid for item in first}) == 3
    assert [item.uid for item in first] == [item.uid for item in again]
    assert first[0].uid == "11f1b0c1d4fd6bd0"


# Faults that fuzzing found


@pytest.mark.parametrize("name", ["weight", "margin"])
def test_numbers_that_no_float_can_hold_are_malformed(name):
    pair = {"prompt": "p", "chosen": "a", "rejected": "b", name: 10**400}
    with pytest.raises(DataError, match=rf"^f\.jsonl:1: `{name}` must be a finite number, found 10*\.\.\.\. Correct"):
        parse_preferences(rows(pair))


def test_ranks_of_hundreds_of_digits_are_numbers():
    pairs, _ = parse_preferences(rows({"prompt": "p", "completions": ["a", "b"], "ranks": [10**400, 1]}))
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("b", "a")]


@pytest.mark.parametrize("rank", [float("nan"), "1", True, None])
def test_ranks_that_are_no_numbers_are_malformed(rank):
    with pytest.raises(DataError, match="`ranks` must be numbers, 1 for the best, found"):
        parse_preferences(rows({"prompt": "p", "completions": ["a", "b"], "ranks": [rank, 1]}))


def test_ranking_of_very_many_replies_is_malformed():
    def ranking(n):
        return {"prompt": "p", "completions": [f"r{i}" for i in range(n)], "ranks": [i // (n - 1) for i in range(n)]}

    assert len(parse_preferences(rows(ranking(256)))[0]) == 255
    with pytest.raises(DataError, match="`completions` has 257 replies; rank 256 at most"):
        parse_preferences(rows(ranking(257)))


def test_many_turns_of_one_speaker_take_no_time_each_for_all_before():
    messages = parse_transcript("\n\nHuman: x" * 100_000 + "\n\nHuman:\n\nAssistant: a\n\nAssistant:\n\nAssistant: b")
    assert messages == [user("\n\n".join("x" * 100_000)), assistant("a\n\nb")]


def test_message_about_very_many_columns_names_some():
    with pytest.raises(DataError) as caught:
        parse_prompts(rows({f"column{i}": 1 for i in range(10_000)}))
    assert len(str(caught.value)) < 1000
