"""Packed training is the same training: rows in one sequence do not see each other, and none is cut."""

import json
import random

import pytest


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """40 chats of one to three turns, of very different lengths."""
    rng = random.Random(0)
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    with file.open("w") as out:
        for row in range(40):
            messages = []
            for turn in range(rng.randint(1, 3)):
                messages.append({"role": "user", "content": f"{row}.{turn} " + "why " * rng.randint(1, 30)})
                messages.append({"role": "assistant", "content": "so " * rng.randint(1, 40)})
            out.write(json.dumps({"messages": messages}) + "\n")
    return file


def one_step_over_all(train, chats, *overrides, rows, micro=1):
    return train(
        f"data.path={chats}",
        "data.validation=null",
        "data.max_length=512",
        f"training.global_batch_size={rows}",
        f"training.per_device_train_batch_size={micro}",
        "training.max_steps=1",
        "training.max_grad_norm=0",
        "precision=fp32",
        "method=full",
        *overrides,
    )


def packed_rows(run) -> int:
    audit = json.loads((run.run_dir / "data_audit.json").read_text())
    return audit["packing"]["rows"]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_and_unpacked_rows_give_the_same_loss_and_gradient(train, chats, attention):
    choice = f"model.attn_implementation={attention}"
    apart = one_step_over_all(train, chats, choice, rows=40, micro=8)
    rows = packed_rows(one_step_over_all(train, chats, "data.packing=bfd", choice, rows=1))
    packed = one_step_over_all(train, chats, "data.packing=bfd", choice, rows=rows)

    assert rows < 40
    (before,), (after,) = apart.metrics(), packed.metrics()
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)
    assert after["grad_norm"] == pytest.approx(before["grad_norm"], rel=1e-4)
    assert after["tokens"] == before["tokens"]


def test_rows_that_see_each_other_would_be_noticed(train, chats, monkeypatch):
    """The test above can fail: positions that run on through a packed row let its parts attend to each other."""
    import torch
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    rows = packed_rows(one_step_over_all(train, chats, "data.packing=bfd", rows=1))
    right = one_step_over_all(train, chats, "data.packing=bfd", rows=rows)
    monkeypatch.setattr(
        DataCollatorForLanguageModeling,
        "get_position_ids_from_packed_seq_lengths",
        staticmethod(lambda lengths: [torch.arange(sum(one)) for one in lengths]),
    )
    wrong = one_step_over_all(train, chats, "data.packing=bfd", rows=rows)

    assert abs(wrong.metrics()[0]["loss"] / right.metrics()[0]["loss"] - 1) > 1e-4
