"""What is asked, as people write it: norms, domains, outputs and inputs in Python, on a command line, in a YAML file."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from lipguard import Ball, Box, Query
from lipguard.domain import domain_from
from lipguard.errors import InvalidDomain, UnsupportedQuery
from lipguard.query import inputs_from, norm_pair, outputs_from


def ends(domain: object, size: int) -> list[list[float]]:
    assert isinstance(domain, Box | Ball)
    return [end.tolist() for end in domain.bounds(size)]


BOXES = {
    "box:0,1": [[0, 0], [1, 1]],
    " box: -1 , 2.5 ": [[-1, -1], [2.5, 2.5]],
    "box:[0,0.1],[1,2]": [[0, 0.1], [1, 2]],
    "box:-1e-3,[1,2]": [[-1e-3, -1e-3], [1, 2]],
}


@pytest.mark.parametrize("text", BOXES)
def test_boxes_as_text(text: str) -> None:
    assert ends(domain_from(text), 2) == BOXES[text]


@pytest.mark.parametrize(
    ("value", "center", "radius", "norm"),
    [
        ("ball:0.1", 0.0, 0.1, 1.0),  # in the norm that is passed on
        ("ball:[1,2],0.1", [1.0, 2.0], 0.1, 1.0),
        ("ball:0.5,0.1,inf", 0.5, 0.1, math.inf),
        ({"kind": "ball", "center": [1, 2], "radius": 0.1, "norm": "inf"}, [1.0, 2.0], 0.1, math.inf),
        ({"radius": 0.1}, 0.0, 0.1, 1.0),
    ],
)
def test_balls_as_text_and_mappings(value: object, center: object, radius: float, norm: float) -> None:
    ball = domain_from(value, norm=1.0)
    assert isinstance(ball, Ball)
    assert (ball.center, ball.radius, ball.norm) == (center, radius, norm)


def test_mappings_as_yaml_gives_them() -> None:
    assert ends(domain_from({"kind": "box", "lower": [0, 0], "upper": 1}), 2) == [[0, 0], [1, 1]]
    assert ends(domain_from({"lower": 0, "upper": 1}), 1) == [[0], [1]]
    inside = domain_from({"kind": "ball", "center": 0.9, "radius": 0.5, "box": {"kind": "box", "lower": 0, "upper": 1}})
    assert ends(inside, 1)[1] == [1.0]
    assert domain_from(None) is None
    assert domain_from(box := Box(0, 1)) is box


@pytest.mark.parametrize(
    "value",
    [
        "box:0", "box:0,1,2", "box:a,b", "cube:0,1", "ball:", "ball:[1,2]", "ball:0,[1]", "ball:0,1,2,3", "box:[0,1", "", "box",
        (0, 1), 3.0, {"kind": "box", "lower": 0}, {"kind": "cube"}, {"lower": 0, "upper": 1, "middle": 2},
        {"lower": "a", "upper": 1}, {"kind": "ball", "radius": 1, "box": {"radius": 1}}, {},
    ],
)  # fmt: skip
def test_what_is_no_domain_is_refused_with_what_to_write(value: object) -> None:
    with pytest.raises(InvalidDomain, match=r"box:0,1|kind: box|numbers, or lists"):
        domain_from(value)


@pytest.mark.parametrize("norm", ["inf", "1, inf", (2, "inf"), math.inf, [1, 2], 2])
def test_norms(norm: object) -> None:
    expected = {"inf": (math.inf, math.inf), "1, inf": (1.0, math.inf)}.get(str(norm))
    pair = norm_pair(norm)  # type: ignore[arg-type]
    assert pair == (expected or (float(norm[0]), float(norm[1])) if isinstance(norm, str | tuple | list) else (norm, norm))


@pytest.mark.parametrize("norm", ["l2", 3, (1, 2, 2), (), "nan", None, -1])
def test_what_is_no_norm_is_refused(norm: object) -> None:
    with pytest.raises(UnsupportedQuery, match="a norm is 1, 2 or inf"):
        norm_pair(norm)  # type: ignore[arg-type]


OUTPUTS = {
    "policy.logits": "policy.logits",
    "0": "0",
    "3,5": (3, 5),
    "policy.logits:3,5": ("policy.logits", (3, 5)),
    "ns:logits": "ns:logits",
    7: 7,
    (3, 5): (3, 5),
    ("policy", (0, 1)): ("policy", (0, 1)),
    ("policy", "0,1"): ("policy", (0, 1)),
    (0, (1, 2)): (0, (1, 2)),
}


@pytest.mark.parametrize("value", OUTPUTS)
def test_outputs(value: object) -> None:
    assert outputs_from(value) == OUTPUTS[value]


def test_outputs_and_inputs_as_matrices() -> None:
    for value in ("[[1,0],[0,-1]]", [[1, 0], [0, -1]], np.array([[1, 0], [0, -1]])):
        found = outputs_from(value)
        assert isinstance(found, torch.Tensor) and found.tolist() == [[1, 0], [0, -1]] and found.dtype == torch.float64
        assert torch.equal(found, inputs_from(value))  # type: ignore[arg-type]
    which, matrix = outputs_from("head:[[1,0.5]]")  # type: ignore[misc]
    assert which == "head" and matrix.tolist() == [[1, 0.5]]  # type: ignore[union-attr]
    assert (inputs_from("x"), inputs_from(1), inputs_from(None)) == ("x", 1, None)
    kept = torch.eye(2)
    assert outputs_from(kept) is kept and inputs_from(kept) is kept


@pytest.mark.parametrize("value", [True, 0.5, {"a": 1}, [1, 2, 3], [[1, 2], [3]], ("a", "b"), []])
def test_what_are_no_outputs_is_refused(value: object) -> None:
    with pytest.raises(UnsupportedQuery, match=r"outputs=\(3, 5\)"):
        outputs_from(value)


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("x", "x"), (1, 1), ("x, context", ("x", "context")), ("0,1", (0, 1)), ([0, "c"], (0, "c")), (("x",), ("x",)),
        (["a,b"], ("a,b",)),
    ],
)  # fmt: skip
def test_inputs_as_people_write_them(value: Any, meant: object) -> None:
    query = Query(inputs=value)
    assert query.inputs == meant
    assert Query.of_json(json.loads(json.dumps(query.json())), None).inputs == meant


@pytest.mark.parametrize("value", [True, 0.5, {"a": 1}, [], "", "x,", (True, "x"), (0.5, "x"), [["x"]]])
def test_what_are_no_inputs_is_refused(value: object) -> None:
    with pytest.raises(UnsupportedQuery, match="inputs='x'"):
        inputs_from(value)


def test_a_query_reads_all_of_it_once() -> None:
    query = Query(norm="inf", domain="ball:0.1", outputs="3,5", inputs="[[1,0]]", submodule="net")
    assert query.norm == (math.inf, math.inf)
    assert isinstance(query.domain, Ball) and query.domain.norm == math.inf
    assert query.outputs == (3, 5) and isinstance(query.inputs, torch.Tensor)
    plain = query.of_network()
    assert (plain.outputs, plain.inputs, plain.submodule, plain.domain) == (None, None, None, query.domain)
    with pytest.raises(UnsupportedQuery, match="dotted name"):
        Query(submodule=3)  # type: ignore[arg-type]
