"""命令行是约定：每个参数的写法、取值方式和默认值都列在这里，改动要从这张表开始。

新增参数时，在对应的表里加一行：(写法, 取值方式, 默认值)。取值方式是 KINDS 的键，
或者一组可选的词。
"""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

import interact
import preprocess
import train

# 取值方式 → (接受的写法与得到的值, 拒绝的写法)
KINDS = {
    "path": ({"a/b.txt": Path("a/b.txt")}, []),
    "paths": ({"a/b.txt": [Path("a/b.txt")]}, []),
    "encoding": ({"gb18030": "gb18030"}, []),
    "size": ({"8000": 8000}, ["1", "x"]),
    "text": ({"0,1": "0,1", "a/b": "a/b"}, []),
    "switch": ({}, []),
    "switch off": ({}, []),
    "int>=0": ({"0": 0, "7": 7}, ["-1", "1.5", "x", ""]),
    "int>=1": ({"1": 1, "7": 7}, ["0", "-1", "1.5"]),
    "1..1000": ({"1": 1, "1000": 1000}, ["0", "1001", "1.5"]),
    "int>=2": ({"2": 2, "7": 7}, ["1", "0"]),
    "int<=-1": ({"-1": -1, "-100": -100}, ["0", "1"]),
    "float>=0": ({"0": 0.0, "2.5": 2.5}, ["-1", "nan", "inf", "x"]),
    "float>0": ({"1e-9": 1e-9, "2": 2.0}, ["0", "-1", "nan", "inf", "x"]),
    "0..1": ({"0": 0.0, "0.9": 0.9, "1": 1.0}, ["-0.1", "1.1", "nan"]),
    "port": ({"0": 0, "65535": 65535}, ["-1", "65536", "x"]),
    "ignored": ({"x": "x"}, []),
}

PREPROCESS = [
    ("--vocab_path", "path", "vocab/vocab.txt"),
    ("--log_path", "path", "data/preprocess.log"),
    ("--train_path", "paths", "data/train.txt"),
    ("--save_path", "path", "data/train.pkl"),
    # 新增的
    (
        "--format",
        [
            *("auto", "chatlab", "telegram", "discord", "wechat", "whatsapp", "line", "qq", "json"),
            *("yaml", "csv", "conv", "tsv", "script", "text", "jsonl", "xlsx"),
        ],
        "auto",
    ),
    ("--encoding", "encoding", "auto"),
    ("--split", "text", "train"),
    ("--text_column", "text", None),
    ("--dialogue_column", "text", None),
    ("--speaker_column", "text", None),
    ("--time_column", "text", None),
    ("--gap_minutes", "float>0", 30),
    ("--join_seconds", "float>=0", 0),
    ("--reply_speaker", "text", None),
    ("--list_speakers", "switch", False),
    ("--no_mask_private", "switch off", True),
    ("--clean", "switch", False),
    ("--check", "switch", False),
    ("--plot", "path", None),
    ("--max_len", "int>=2", 150),
    ("--min_turns", "int>=1", 1),
    ("--max_turns", "int>=0", 0),
    ("--drop_duplicates", "switch", False),
    ("--max_dialogues", "int>=0", 0),
    ("--build_vocab", "size", None),
    ("--bert_vocab", "path", None),
]

TRAIN = [
    # 参考实现就有的
    ("--device", "text", "0"),
    ("--no_cuda", "switch", False),
    ("--vocab_path", "path", "vocab/vocab.txt"),
    ("--model_config", "path", "model/config.json"),
    ("--train_path", "path", "data/train.pkl"),
    ("--max_len", "int>=2", 150),
    ("--log_path", "path", "data/train.log"),
    ("--log", "ignored", None),
    ("--ignore_index", "int<=-1", -100),
    ("--epochs", "int>=1", 100),
    ("--batch_size", "int>=1", 4),
    ("--gpu0_bsz", "ignored", None),
    ("--lr", "float>0", None),
    ("--eps", "float>0", 1e-9),
    ("--log_step", "int>=1", 10),
    ("--gradient_accumulation_steps", "int>=1", 4),
    ("--max_grad_norm", "float>0", 2.0),
    ("--save_model_path", "path", "model"),
    ("--pretrained_model", "text", ""),
    ("--num_workers", "int>=0", 0),
    ("--patience", "int>=0", 0),
    ("--warmup_steps", "int>=0", None),
    ("--val_num", "int>=1", 8000),
    # 新增的
    ("--seed", "int>=0", 0),
    ("--optimizer", ["auto", "adamw", "muon"], "auto"),
    ("--lr_schedule", ["linear", "cosine", "constant"], "linear"),
    ("--precision", ["auto", "fp32", "bf16", "fp16"], "auto"),
    ("--compile", "switch", False),
    ("--gradient_checkpointing", "switch", False),
    ("--resume", "switch", False),
    ("--save_steps", "int>=0", 0),
    ("--save_total_limit", "int>=0", 0),
    ("--loss_on", ["all", "replies"], "all"),
    ("--batch_tokens", "int>=0", 0),
    ("--eval_steps", "int>=0", 0),
    ("--train_mmi", "switch", False),
]

INTERACT = [
    # 参考实现就有的
    ("--device", "text", "0"),
    ("--temperature", "float>0", 1.0),
    ("--topk", "int>=0", 8),
    ("--topp", "0..1", 0.0),
    ("--log_path", "path", "data/interact.log"),
    ("--vocab_path", "path", None),
    ("--model_path", "text", "model/epoch40"),
    ("--save_samples_path", "path", "sample/"),
    ("--repetition_penalty", "float>0", 1.0),
    ("--max_len", "int>=1", 25),
    ("--max_history_len", "int>=1", 3),
    ("--no_cuda", "switch", False),
    # 新增的
    ("--seed", "int>=0", None),
    ("--greedy", "switch", False),
    ("--min_p", "0..1", 0.0),
    ("--no_repeat_ngram_size", "int>=0", 0),
    ("--precision", ["auto", "fp32", "bf16", "int8"], "auto"),
    ("--num_candidates", "1..1000", 1),
    ("--mmi_model_path", "text", None),
    ("--debug", "switch", False),
    ("--no_input_history", "switch", False),
    ("--input_path", "path", None),
    ("--output_path", "path", None),
    ("--report", "switch", False),
    ("--web", "switch", False),
    ("--host", "text", "127.0.0.1"),
    ("--port", "port", 8000),
    ("--api_key", "text", None),
    ("--cors", "text", None),
    ("--no_chat_log", "switch", False),
]

COMMAND = re.compile(
    r"\b(?:python|torchrun)\b[^|;&#]*?\b(preprocess|train|interact)\.py([^|;&<>#]*)"
)

SCRIPTS = {"preprocess": preprocess, "train": train, "interact": interact}
TABLES = {"preprocess": PREPROCESS, "train": TRAIN, "interact": INTERACT}
ROWS = [(script, *row) for script, table in TABLES.items() for row in table]


def actions_of(script: str) -> dict[str, argparse.Action]:
    """写法 → argparse 的 action，不含 --help。"""
    actions = SCRIPTS[script].build_parser()._actions
    return {flag: a for a in actions for flag in a.option_strings if a.dest != "help"}


def parse(script: str, *argv: str) -> dict[str, object]:
    """解析后按写法取值。"""
    args = SCRIPTS[script].build_parser().parse_args(argv)
    return {flag: getattr(args, action.dest) for flag, action in actions_of(script).items()}


@pytest.mark.parametrize("script", TABLES)
def test_flags_are_exactly_those_of_the_table(script):
    flags = [flag for flag, _, _ in TABLES[script]]
    assert set(actions_of(script)) == set(flags)
    assert len(flags) == len(set(flags))


@pytest.mark.parametrize(("script", "flag", "kind", "default"), ROWS)
def test_default_is_that_of_the_table(script, flag, kind, default):
    expected = Path(default) if kind in ("path", "paths") and default is not None else default
    expected = [expected] if kind == "paths" else expected
    found = parse(script)[flag]
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(("script", "flag", "kind", "default"), ROWS)
def test_value_is_taken_as_the_table_says(script, flag, kind, default, capsys):
    if kind == "switch":
        accepted, refused = {}, ["1"]
        assert parse(script, flag)[flag] is True
    elif isinstance(kind, list):
        accepted, refused = dict(zip(kind, kind, strict=True)), ["other", ""]
    else:
        accepted, refused = KINDS[kind]
    for text, value in accepted.items():
        found = parse(script, flag, text)[flag]
        assert (found, type(found)) == (value, type(value))
    for text in refused:
        with pytest.raises(SystemExit) as stop:
            parse(script, f"{flag}={text}")
        assert stop.value.code == 2
        assert flag in capsys.readouterr().err


@pytest.mark.parametrize("script", TABLES)
def test_every_help_text_is_chinese_and_names_its_default(script):
    for flag, action in actions_of(script).items():
        assert re.search(r"[\u4e00-\u9fff]", action.help), flag
        has_value = action.default not in (None, False, "") and action.nargs != 0
        assert not has_value or "默认 %(default)s" in action.help, flag
    assert re.search(r"[\u4e00-\u9fff]", SCRIPTS[script].build_parser().description)


@pytest.mark.parametrize("script", TABLES)
def test_help_prints_every_flag_and_exits_0(script, capsys):
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script].main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(f"{flag} " in f"{out} " or f"{flag}\n" in out for flag, _, _ in TABLES[script])


def readme_commands() -> list[tuple[str, list[str]]]:
    """README 代码块里运行三个脚本的每条命令：脚本名和它的参数。"""
    commands, is_code = [], False
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            is_code = not is_code
        elif is_code:
            for script, arguments in COMMAND.findall(line):
                if script in SCRIPTS:
                    commands.append((script, shlex.split(arguments)))
    return commands


def test_readme_shows_all_three_scripts():
    assert {script for script, _ in readme_commands()} == set(SCRIPTS)


@pytest.mark.parametrize(("script", "argv"), readme_commands())
def test_readme_command_parses(script, argv):
    args = SCRIPTS[script].build_parser().parse_args([word for word in argv if word != "..."])
    assert args is not None  # 写错的参数会让 parse_args 退出


@pytest.mark.parametrize("script", TABLES)
def test_readme_explains_every_flag(script):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(rf"^### {script}\.py.*?(?=^##)", text, re.MULTILINE | re.DOTALL)
    explained = set(re.findall(r"`(--\w+)", section.group()))
    assert {flag for flag, _, _ in TABLES[script]} <= explained
