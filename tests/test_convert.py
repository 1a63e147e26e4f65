import numpy as np
import pytest

from convert import Rule, convert
from convert.table import left_out

RULES = [
    Rule("blocks.*.fc.weight", "blocks/fc/kernel", "o i -> i o"),
    Rule("head.weight", "head/kernel", "o (c p) -> p c o"),
]
TENSORS = {f"blocks.{i}.fc.weight": np.full((2, 3), i, np.float32) for i in range(11)} | {
    "head.weight": np.arange(12, dtype=np.float32).reshape(2, 6)
}


def test_every_tensor_goes_where_its_rule_says_and_layers_are_stacked_by_number():
    tree = convert(RULES, TENSORS, p=2)
    assert tree["blocks"]["fc"]["kernel"].shape == (11, 3, 2)
    assert tree["blocks"]["fc"]["kernel"][:, 0, 0].tolist() == list(range(11))
    assert tree["head"]["kernel"].shape == (2, 3, 2) and tree["head"]["kernel"][1, 0, 0] == 1


def test_a_tensor_without_a_rule_is_named():
    with pytest.raises(KeyError, match=r"tensors without a rule: \['blocks.0.odd'\]"):
        convert(RULES, TENSORS | {"blocks.0.odd": np.zeros(1)}, p=2)


@pytest.mark.parametrize("key", ["head.weight", "blocks.4.fc.weight"])
def test_a_rule_without_its_tensor_and_a_missing_layer_are_named(key):
    rest = {name: tensor for name, tensor in TENSORS.items() if name != key}
    with pytest.raises(
        KeyError, match=r"rules without their tensors: \['(head.weight|blocks.\*.fc.weight)'\]"
    ):
        convert(RULES, rest, p=2)


def test_stacks_of_unequal_depth_and_double_claims_are_refused():
    norms = {f"blocks.{i}.norm.weight": np.zeros(2, np.float32) for i in range(10)}
    with pytest.raises(KeyError, match=r"stacks of unequal depth: \[10, 11\]"):
        convert([*RULES, Rule("blocks.*.norm.weight", "blocks/norm/scale", "d -> d")], TENSORS | norms, p=2)
    with pytest.raises(KeyError, match=r"two rules claim: \['head.weight'\]"):
        convert([*RULES, Rule("head.weight", "other", "o i -> i o")], TENSORS, p=2)
    tail = {"tail.weight": np.zeros(2, np.float32)}
    with pytest.raises(KeyError, match="two rules put a tensor at head/kernel"):
        convert([*RULES, Rule("tail.weight", "head/kernel", "d -> d")], TENSORS | tail, p=2)


def test_what_comes_out_is_contiguous():
    """A strided array is stored wrong by some versions of safetensors."""
    tree = convert(RULES, TENSORS, p=2)
    for kernel in (tree["blocks"]["fc"]["kernel"], tree["head"]["kernel"]):
        assert kernel.flags["C_CONTIGUOUS"]


def test_what_is_left_out_is_passed_over_and_may_be_absent():
    rules = [left_out("text."), left_out("blocks.10."), left_out("absent"), *RULES]
    tree = convert(rules, TENSORS | {"text.odd": np.zeros(1)}, p=2)
    assert tree["blocks"]["fc"]["kernel"][:, 0, 0].tolist() == list(range(10))
    assert set(tree) == {"blocks", "head"}
    with pytest.raises(KeyError, match=r"rules without their tensors: \['head.weight'\]"):
        convert([left_out("head."), *RULES], TENSORS, p=2)
    with pytest.raises(KeyError, match=r"tensors without a rule: \['context.odd'\]"):
        convert(rules, TENSORS | {"context.odd": np.zeros(1)}, p=2)
