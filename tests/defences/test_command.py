"""`detune defend`."""

import json
import re

import pytest
from safetensors.torch import load_file

from detune.defences import DEFENCES, FrozenA


def test_help_lists_them(command):
    ran = command("defend", "--help")
    assert ran.code == 0
    for defence in (*DEFENCES.values(), FrozenA):
        assert re.search(rf"^  {defence.name} +{defence.about[:20]}", ran.out, re.MULTILINE)


def test_a_setting_has_an_option_of_its_kind(command):
    said = " ".join(command("defend", "lorenc", "--help").out.split())
    assert re.search(r"--base PATH What IN was fine-tuned from\. +\[required\]", said)
    assert re.search(r"--rank INTEGER RANGE How many .* \[x>=1\]", said)
    assert "--adapter As an authorised user" in said
    assert "--grid [float8_e4m3fn|float8_e5m2]" in command("defend", "fp8", "--help").out


def test_settings_and_seed_are_passed_on(command, bert, tmp_path):
    ran = command("defend", "noise", bert, tmp_path / "out", "--seed", "5", "--size", "0.25", "--json")
    report = json.loads(ran.out)
    assert (report["seed"], report["settings"], report["defence"]) == (5, {"size": 0.25}, "noise")
    assert report["relative_change"] == pytest.approx(0.25, rel=0.1)
    assert ran.code == 0


def test_a_seed_is_drawn_and_told_once(command, bert, tmp_path):
    told = [command("defend", "bf16", bert, tmp_path / out).out.split()[-1] for out in "ab"]
    assert told[0] != told[1]


def test_it_says_that_the_function_stayed(command, bert, tmp_path):
    ran = command("defend", "permutation", bert, tmp_path / "out")
    assert "the same function: outputs of up to" in ran.out


def test_texts_are_needed_where_activations_are(command, bert, texts, tmp_path):
    assert "Missing option '--texts'" in command("defend", "quiet-noise", bert, tmp_path / "out").err
    assert command("defend", "padding", bert, tmp_path / "out", "--texts", texts).code == 0


def test_frozen_a_writes_an_adapter(command, bert, tmp_path):
    ran = command("defend", "frozen-a", bert, tmp_path / "out", "--rank", "2", "--targets", "query, key")
    assert ran.code == 0
    names = set(load_file(tmp_path / "out" / "adapter_model.safetensors"))
    assert {name.split(".")[-3] for name in names} == {"query", "key"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["everything", "{model}", "{out}"], "No such command 'everything'"),
        (["noise", "{model}", "{model}"], "or lies inside it; expected a place elsewhere"),
        (["noise", "{out}", "{out}-2"], "no such model"),
        (["noise", "{model}", "{out}", "--size", "-1"], "Invalid value for '--size'"),
        (["permutation", "{plain}", "{out}"], "no symmetries are known of model_type None"),
        (["frozen-a", "{out}", "{out}-2"], "no adapter of"),
    ],
)
def test_bad_input_is_one_line(command, bert, tmp_path, words, message):
    from tests.families import plain_state, save_plain

    places = {"model": bert, "out": tmp_path / "out", "plain": save_plain(tmp_path / "plain", plain_state())}
    ran = command("defend", *(word.format(**places) for word in words))
    assert ran.code == 2
    assert message in ran.err
    assert not (tmp_path / "out").exists()
