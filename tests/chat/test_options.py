"""旋钮的表：文字和 JSON 的数读出同样的值，合法与否也相同。"""

import argparse
import dataclasses

import pytest

from chitchat.chat.options import KNOBS, SamplingOptions
from chitchat.errors import UserError


def test_every_field_but_greedy_has_a_knob():
    fields = {field.name for field in dataclasses.fields(SamplingOptions)} - {"greedy"}
    assert {knob.field for knob in KNOBS.values()} == fields
    assert all(knob.name == name for name, knob in KNOBS.items())


@pytest.mark.parametrize("name", KNOBS)
@pytest.mark.parametrize("number", [-1, 0, 0.5, 1, 1.5, 3, 10**30, -0.0, float("nan"), 1e400])
def test_text_and_json_agree(name, number):
    knob = KNOBS[name]
    found = []
    for value, read in ((str(number), knob.parse), (number, knob.read), (str(number), knob.read)):
        try:
            found.append((read(value), type(read(value))))
        except (UserError, argparse.ArgumentTypeError) as error:
            found.append(str(error))
    whole = knob.kind is int and isinstance(number, float) and number.is_integer()
    assert found[0] == found[2]
    assert found[0] == found[1] or whole  # JSON 里 3.0 就是 3


@pytest.mark.parametrize("value", [True, None, [], {}, "x", ""])
def test_what_is_no_number_is_refused(value):
    for knob in KNOBS.values():
        with pytest.raises(UserError, match="得到"):
            knob.read(value)
