import json
import re
from pathlib import Path
from typing import cast

import pytest
from config_values import PPO, SFT, problem

from rlhf_ray.config import PPOConfig, dump_config, from_dict, load_config
from rlhf_ray.config.keys import fields, leaves, section_of
from rlhf_ray.config.load import CONFIGS, Kind
from rlhf_ray.config.reference import config_reference, page
from rlhf_ray.config.yaml_rules import dump_yaml, parse_yaml
from rlhf_ray.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CONFIG_FILES = sorted((ROOT / "configs").glob("*.yaml"))


def kind_of(path: Path) -> Kind:
    match = re.match(r"# rlhf-ray (sft|reward|dpo|ppo|pipeline) configs/(\S+)", path.read_text(encoding="utf-8"))
    assert match, f"{path.name} does not begin with the command that runs it"
    assert match[2] == path.name
    return cast(Kind, match[1])


# Files of the project


def test_the_expected_configurations_are_there():
    assert [path.stem for path in CONFIG_FILES] == [
        "demo",
        "multi_node",
        "one_gpu",
        "one_node",
        "real_dpo",
        "real_ppo",
        "real_ppo_pretrained",
        "real_reward",
        "real_sft",
        "smoke_dpo",
        "smoke_ppo",
        "smoke_reward",
        "smoke_sft",
    ]


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
def test_every_configuration_file_loads(path):
    kind = kind_of(path)
    assert isinstance(load_config(path, [], kind), CONFIGS[kind])


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
def test_a_dumped_configuration_loads_back_to_the_same(path, tmp_path):
    kind = kind_of(path)
    config = load_config(path, [], kind)
    dumped = tmp_path / "config.yaml"
    dumped.write_text(dump_config(config), encoding="utf-8")
    assert load_config(dumped, [], kind) == config


def test_the_reference_page_is_current():
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == page(), (
        "run python -m rlhf_ray.config.reference"
    )


# Shape of the schema


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_key_is_described_in_one_sentence(kind):
    for key, field in fields(CONFIGS[kind]):
        assert field.description, key
        assert field.description.endswith("."), key
        assert len(re.findall(r"\.(\s|$)", field.description)) == 1, key


def test_ppo_has_few_enough_keys():
    assert len(leaves(PPOConfig)) <= 100


@pytest.mark.parametrize(("kind", "section"), [("sft", "sft"), ("reward", "reward_model"), ("dpo", "dpo")])
def test_each_stage_has_a_section_of_its_own(kind, section):
    assert list(CONFIGS[kind].model_fields) == [
        "run",
        "tracking",
        "placement",
        "data",
        "model",
        "training",
        "group",
        section,
    ]


def test_sections_cannot_be_changed():
    config = from_dict(SFT, "sft")
    with pytest.raises(ValueError, match="frozen"):
        config.sft.epochs = 2


def test_the_reference_lists_type_bounds_default_and_meaning():
    rows = config_reference("ppo").splitlines()
    assert "| `run.dir` | text | required | Folder that receives everything the run writes. |" in rows
    assert any(row.startswith("| `ppo.lam` | number, >= 0, <= 1 | `0.95` | ") for row in rows)
    assert any(row.startswith("| `reward.models.*.weight` | number | `1.0` | ") for row in rows)
    assert any(row.startswith("| `rollout.kv_cache_gib` | number or null, > 0 | `null` | ") for row in rows)


def test_the_reference_has_a_row_for_every_key_that_holds_a_value():
    assert {f"| `{key}` |" for key in leaves(PPOConfig)} <= {
        row[: row.index("|", 2) + 1] for row in config_reference("ppo").splitlines()
    }


def test_section_of_sees_through_optional_and_list():
    assert section_of(PPOConfig) == (PPOConfig, False)
    assert section_of(PPOConfig | None) == (PPOConfig, False)
    assert section_of(list[PPOConfig]) == (PPOConfig, True)
    assert section_of(list[PPOConfig] | None) == (PPOConfig, True)
    assert section_of(dict[str, str]) == (None, False)


# YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-3", -3),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("off", "off"),
        ("on", "on"),
        ("yes", "yes"),
        ("true", True),
        ("~", None),
        ("", None),
        ("'3'", "3"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("package.module:function", "package.module:function"),
    ],
)
def test_yaml_scalars_follow_the_core_schema(text, value):
    parsed = parse_yaml(f"key: {text}")["key"]
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    "text", ["1e-4", "off", "true", "3", "null", "", "~", "0x1f", ".5", "1:2", "a\nb", "caf\u00e9"]
)
def test_text_that_looks_like_something_else_survives_a_dump(text):
    assert parse_yaml(dump_yaml({"key": text})) == {"key": text}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "run: {dir: a}\nrun: {dir: b}",
            ", line 2, column 1: not valid YAML: the key 'run' appears twice; keep one",
        ),
        (
            "run:\n  dir: a\n  dir: b",
            ", line 3, column 3: not valid YAML: the key 'dir' appears twice; keep one",
        ),
        ("run: [", ", line 1, column 7: not valid YAML: expected the node content, but found '<stream end>'"),
        ("1: a", ", line 1, column 1: not valid YAML: the key 1 is not text"),
        ("- a", ': found ["a"], expected sections such as `run:` with keys below'),
        ("", ": found nothing, expected sections such as `run:` with keys below"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_with_its_place(text, message, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_config(path, [], "sft")
    assert str(error.value) == f"{path}{message}"


def test_a_file_that_is_absent_or_not_text_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read: .*No such file"):
        load_config(tmp_path / "absent.yaml", [], "sft")
    (tmp_path / "latin.yaml").write_bytes(b"run: \xe9")
    with pytest.raises(ConfigError, match=r"latin\.yaml: cannot be read: .*utf-8"):
        load_config(tmp_path / "latin.yaml", [], "sft")


# Overrides


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("sft.learning_rate=1e-4", lambda config: config.sft.learning_rate == 1e-4),
        ("tracking.wandb=off", lambda config: config.tracking.wandb == "off"),
        ("data.path=[a.jsonl, b.jsonl]", lambda config: config.data.path == ["a.jsonl", "b.jsonl"]),
        ("data.limit=5", lambda config: config.data.limit == 5),
        ("data.limit=", lambda config: config.data.limit is None),
        ("data.columns.prompt=question", lambda config: config.data.columns == {"prompt": "question"}),
        ("run.dir=a=b", lambda config: config.run.dir == "a=b"),
        ("data.path.1=b.jsonl", lambda config: config.data.path == ["a.jsonl", "b.jsonl"]),
        ("training={zero_stage: 3}", lambda config: config.training.zero_stage == 3),
    ],
)
def test_an_override_sets_one_key(override, read):
    values = {**SFT, "data": {"path": ["a.jsonl", "c.jsonl"]}}
    assert read(from_dict(values, "sft", [override]))


def test_overrides_reach_into_lists_and_append_to_them():
    config = from_dict(
        PPO,
        "ppo",
        [
            "reward.models.0.weight=2",
            "reward.models.1.path=other",
            "reward.functions.0.path=package.module:function",
        ],
    )
    assert [(model.path, model.weight) for model in config.reward.models] == [("reward", 2.0), ("other", 1.0)]
    assert config.reward.functions[0].path == "package.module:function"


def test_the_last_override_of_a_key_wins():
    assert from_dict(SFT, "sft", ["run.seed=1", "run.seed=2"]).run.seed == 2


def test_overrides_leave_the_values_alone():
    from_dict(PPO, "ppo", ["reward.models.0.weight=2", "run.seed=9"])
    assert PPO["reward"] == {"models": [{"path": "reward"}]}
    assert PPO["run"] == {"dir": "runs/x"}


def test_an_override_changes_one_of_two_aliases_only(tmp_path):
    path = tmp_path / "anchors.yaml"
    path.write_text(
        dump_yaml({key: PPO[key] for key in PPO if key != "reward"})
        + "reward: {models: [&model {path: reward}, *model]}\n",
        encoding="utf-8",
    )
    config = load_config(path, ["reward.models.0.weight=2"], "ppo")
    assert [model.weight for model in config.reward.models] == [2.0, 1.0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.seed", "override 'run.seed': expected section.key=value"),
        ("=3", "override '=3': expected section.key=value"),
        ("run..seed=3", "override 'run..seed=3': expected section.key=value"),
        ("run.dir.x=3", "override 'run.dir.x=3': run.dir is \"runs/x\", so it has no x"),
        ("reward.models.2.path=a", "is a list of 1, so it has no 2; the next index is 1"),
        ("reward.models.first.path=a", "is a list of 1, so it has no first; the next index is 1"),
        ("data.path=[a", "override 'data.path=[a': the value is not valid YAML: "),
    ],
)
def test_an_override_that_cannot_be_applied_is_refused(override, message):
    assert message in problem("ppo", override)


# Single values


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.seed='3'", 'run.seed: found "3", expected a whole number without quotes'),
        ("run.seed=three", 'run.seed: found "three", expected a whole number'),
        ("run.seed=3.0", "run.seed: found 3.0, expected a whole number"),
        ("run.seed=true", "run.seed: found true, expected a whole number"),
        ("run.seed=-1", "run.seed: found -1, expected a value greater than or equal to 0"),
        ("run.seed=", "run.seed: found nothing, expected a whole number"),
        ("run.dir=3", "run.dir: found 3, expected text in quotes"),
        ("run.dir=''", 'run.dir: found "", expected text that is not empty'),
        ("run.timeout_s=.inf", "run.timeout_s: found Infinity, expected a finite number"),
        ("run=3", "run: found 3, expected a section (a mapping of keys)"),
        ("data.path=3", "data.path: found 3, expected text in quotes or a list"),
        ("data.path=[]", "data.path: found [], expected at least one item"),
        ("data.as_chat='true'", 'data.as_chat: found "true", expected true or false without quotes'),
        ("data.overlong=cut", "data.overlong: found \"cut\", expected 'error', 'drop' or 'truncate'"),
        ("data.columns=[a]", 'data.columns: found ["a"], expected a mapping'),
        ("training.zero_stage=4", "training.zero_stage: found 4, expected a value less than or equal to 3"),
        ("group.processes=0", "group.processes: found 0, expected a value greater than or equal to 1"),
    ],
)
def test_a_wrong_value_says_what_was_found_and_what_is_expected(override, message):
    assert problem("sft", override) == message


def test_a_whole_number_is_taken_for_a_number():
    learning_rate = from_dict(SFT, "sft", ["sft.learning_rate=1"]).sft.learning_rate
    assert learning_rate == 1.0
    assert type(learning_rate) is float


def test_a_missing_key_is_named():
    with pytest.raises(ConfigError) as error:
        from_dict({"run": {}, "model": {"path": "model"}}, "sft")
    assert str(error.value) == "configuration: 2 problems:\n  run.dir: missing; set it\n  data: missing; set it"


def test_all_problems_are_told_at_once_with_the_file(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("run: {dir: x, sead: 1}\ndata: {path: a, limit: 0}\nmodel: {path: m}\nsft: {epochs: 1.5}")
    with pytest.raises(ConfigError) as error:
        load_config(path, [], "sft")
    lines = str(error.value).splitlines()
    assert lines[0] == f"{path}: 3 problems:"
    assert sorted(lines[1:]) == [
        "  data.limit: found 0, expected a value greater than or equal to 1",
        "  run.sead: unknown key; did you mean run.seed?",
        "  sft.epochs: found 1.5, expected a whole number",
    ]


@pytest.mark.parametrize(
    ("kind", "key", "suggestion"),
    [
        ("sft", "training.weigth_decay", "did you mean training.weight_decay?"),
        ("sft", "training.learning_rate", "did you mean sft.learning_rate?"),
        ("sft", "trainning", "did you mean training?"),
        ("sft", "run.zero_stage", "did you mean run.checkpoint_storage or training.zero_stage?"),
        ("ppo", "ppo.clip", "did you mean ppo.clip_range or reward.clip?"),
        ("ppo", "ppo.tempereture", "did you mean rollout.temperature?"),
        ("ppo", "reward.models.0.wieght", "did you mean reward.models.0.weight?"),
        ("pipeline", "ppo.rollout.engins", "did you mean ppo.rollout.engines?"),
        ("pipeline", "policy", "did you mean ppo.policy?"),
        (
            "sft",
            "run.xyzzy",
            "the keys here are dir, seed, resume, checkpoint_every, keep_checkpoints, checkpoint_storage, grace_s, "
            "timeout_s, min_timeout_s, ray_address",
        ),
    ],
)
def test_an_unknown_key_comes_with_the_nearest_valid_one(kind, key, suggestion):
    assert problem(kind, f"{key}=1") == f"{key}: unknown key; {suggestion}"


# Faults that fuzzing found


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("!!timestamp 2001-99-99", "could not determine a constructor for the tag 'tag:yaml.org,2002:timestamp'"),
        ("!!binary x", "could not determine a constructor for the tag 'tag:yaml.org,2002:binary'"),
        ("!!int x", "'x' is no int"),
        ("!!int", "'' is no int"),
        ("!!float x", "'x' is no float"),
        ("!!bool x", "'x' is no bool"),
        ("9223372036854775808", "9223372036854775808 is no number of 64 bits; make it smaller"),
        ("9" * 5000, f"{'9' * 30}... is no number of 64 bits; make it smaller"),
        ('"\\U00110000"', "a value that is none (chr() arg not in range(0x110000))"),
        ('"\\0"', "a NUL character, which no name or path can have"),
        ('"\\uD800"', "an unpaired surrogate escape, which is no character"),
        ("&a [*a]", "an alias of what it stands in, which has no end"),
        ("[" * 60 + "]" * 60, "nested deeper than 50 levels"),
        (f"[{'&a [x, x, x], ' + '*a, ' * 33_000}]", "more than 100000 values, with those that aliases repeat"),
        ("x" * 300_000, "300000 characters; at most 262144 are read"),
    ],
    ids=lambda value: value[:30],
)
def test_values_that_no_key_can_hold_are_refused_in_words(text, reason, tmp_path):
    assert problem("sft", f"data.path={text}").endswith(f": the value is not valid YAML: {reason}")
    path = tmp_path / "a.yaml"
    path.write_text(f"data:\n  path: {text}\n")
    with pytest.raises(ConfigError, match=re.escape(reason) if len(text) < 200_000 else "more than 262144 characters"):
        load_config(path, [], "sft")


def test_json_is_yaml_also_where_it_escapes_characters_beyond_16_bits(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(json.dumps(SFT | {"run": {"dir": "runs/\U0001f600"}}))
    assert load_config(path, [], "sft").run.dir == "runs/\U0001f600"


def test_numbers_whose_product_is_beyond_all_bounds_are_refused():
    assert problem("sft", "group.gpus=1e308", f"group.processes={2**63 - 1}") == (
        "holds a number too large to reckon with (cannot convert float infinity to integer); make it smaller"
    )


def test_whole_numbers_from_python_have_64_bits_too():
    with pytest.raises(ConfigError, match=r"^configuration: run\.seed: 0x8000000000000000 is no number of 64 bits"):
        from_dict(SFT | {"run": {"dir": "runs/x", "seed": 2**63}}, "sft")


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("reward.models.\u00b2.path", "reward.models is a list of 1, so it has no \u00b2; the next index is 1"),
        ("reward.models.\u0663.path", "reward.models is a list of 1, so it has no \u0663; the next index is 1"),
        (f"reward.models.{'9' * 5000}.path", f"reward.models is a list of 1, so it has no {'9' * 200}...; the next"),
        ("data.path" + ".0" * 60, "found 62 parts in its key, expected 50 at most"),
    ],
    ids=lambda value: value[:30],
)
def test_overrides_of_keys_that_count_in_no_list_are_refused(key, reason):
    assert reason in problem("ppo", f"{key}=x")


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"run": {"dir": "a\0b"}}, "run.dir"),
        ({"data": {"path": ["a", "b\0"]}}, "data.path"),
        ({"placement": {"labels": {"group": {"\0": "a"}}}}, "placement.labels"),
    ],
)
def test_texts_from_python_have_no_nul_either(values, key):
    with pytest.raises(ConfigError, match=rf"^configuration: {key}: holds a NUL character, which no name or path"):
        from_dict(SFT | values, "sft")


def test_texts_from_python_are_characters():
    with pytest.raises(ConfigError, match=r"^configuration: data.eval_path: holds an unpaired surrogate"):
        from_dict(SFT | {"data": SFT["data"] | {"eval_path": "\ud800"}}, "sft")


def test_only_the_first_of_very_many_problems_are_told():
    message = problem("sft", *(f"sft.key{i}=1" for i in range(1000)))
    assert message.startswith("1000 problems:\n  sft.key0: unknown key; ")
    assert message.endswith("\n  and 970 more")
    assert len(message.splitlines()) == 32


def test_names_of_any_length_are_shortened_in_messages():
    assert problem("sft", f"sft.{'x' * 5000}=1").startswith(
        f"sft.{'x' * 96}...: unknown key; the keys here are learning_rate, "
    )


@pytest.mark.parametrize("value", [["\ud800"], [[]]], ids=["surrogate", "endless"])
def test_values_from_python_that_cannot_be_shown_are_refused(value):
    if value == [[]]:
        value[0] = value
    with pytest.raises(ConfigError, match="a value of type list that cannot be shown"):
        from_dict(SFT | {"run": {"dir": value}}, "sft")


@pytest.mark.parametrize(("path", "reason"), [("a\0b", "embedded null byte"), ("/dev/zero", "more than 262144 char")])
def test_files_that_are_no_configuration_are_refused(path, reason):
    with pytest.raises(ConfigError, match=reason):
        load_config(path, [], "sft")
