"""What packed adapters add to one layer's product: all at once, to the last bit what each would add by itself."""

import peft
import pytest
import torch
from torch import nn

from llmkit.training.pack.process_state import ProcessState
from llmkit.training.pack.updates import Rows, add_at_once, plain_updates, with_update

WIDTH, OUTPUT, TOKENS = 48, 40, 9


class Run:
    """An owner of rows, which draws nothing here."""

    def __init__(self):
        self.state, self.layers = ProcessState(), {}


def adapted(rank, dtype, dropout=0.0):
    """PEFT's layer with an adapter that is not zero."""
    config = peft.LoraConfig(r=rank, lora_alpha=5, lora_dropout=dropout, target_modules=["0"], init_lora_weights=False)
    model = nn.Sequential(nn.Linear(WIDTH, OUTPUT))
    return peft.inject_adapter_in_model(config, model).to(dtype)[0]


def parts_of(*layers, first=TOKENS):
    """Two rows of each, those of the first so many tokens long."""
    lengths = [first, *[TOKENS] * (len(layers) - 1)]
    bounds = [(2 * number, 2 * number + 2) for number in range(len(layers))]
    return [(Rows(*rows, length, Run()), layer) for rows, length, layer in zip(bounds, lengths, layers, strict=True)]


def result(parts, x, base, weights, add):
    """The layer's output, and all gradients of a sum of it."""
    x = x.clone().requires_grad_()
    out = add(x, base(x))
    (out * weights).sum().backward()
    trained = [one for _, layer in parts if layer for name, one in layer.named_parameters() if "lora_" in name]
    gradients = [one.grad.clone() for one in trained]
    for one in trained:
        one.grad = None
    return [out.detach(), x.grad, *gradients]


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    ("dtype", "mixed"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)],
    ids=["float32", "bfloat16", "autocast"],
)
@pytest.mark.parametrize("first", [TOKENS - 2, TOKENS], ids=["padded", ""])
@pytest.mark.parametrize("ranks", [(3, 8, 16), (3, None, 16)], ids=["", "one without"])
def test_updates_at_once_are_to_the_last_bit_those_of_each_run(dtype, mixed, bias, first, ranks):
    torch.manual_seed(0)
    base = nn.Linear(WIDTH, OUTPUT, bias=bias).to(dtype).requires_grad_(False)
    parts = parts_of(*(rank and adapted(rank, dtype) for rank in ranks), first=first)
    x, weights = torch.randn(6, TOKENS, WIDTH, dtype=dtype), torch.randn(6, TOKENS, OUTPUT, dtype=dtype)

    def each_by_itself(x, out):
        sizes = [2] * len(parts)
        return torch.cat(
            [
                with_update(*part, own, its)
                for part, own, its in zip(parts, x.split(sizes), out.split(sizes), strict=True)
            ]
        )

    def at_once(x, out):
        updates = plain_updates(parts, x, out)
        assert len(updates) == len(ranks) - ranks.count(None)
        return add_at_once(out, x, updates)

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        together = result(parts, x, base, weights, at_once)
        apart = result(parts, x, base, weights, each_by_itself)

    assert all(one.equal(other) for one, other in zip(together, apart, strict=True))


def test_a_layer_that_no_run_has_an_adapter_on_is_the_bases_alone():
    x, out = torch.randn(2, TOKENS, WIDTH), torch.randn(2, TOKENS, OUTPUT)

    updates = plain_updates(parts_of(None), x, out)

    assert updates == []
    assert add_at_once(out, x, updates) is out


def test_what_is_more_than_a_product_is_not_added_at_once():
    x, out = torch.randn(4, TOKENS, WIDTH), torch.randn(4, TOKENS, OUTPUT)
    plain = parts_of(adapted(3, torch.float32), adapted(8, torch.float32))

    assert plain_updates(parts_of(adapted(3, torch.float32), adapted(8, torch.float32, dropout=0.1)), x, out) is None
    assert plain_updates(parts_of(adapted(3, torch.float32), adapted(8, torch.bfloat16)), x, out) is None
    assert plain_updates(plain, x.flatten(0, 1), out.flatten(0, 1)) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert plain_updates(plain, x.double(), out.double()) is None  # which it leaves as it is
    assert plain_updates(plain, x, out) is not None
