"""The rows of new tokens in a model's matrices, and a start for them that training can build on.

Where a row starts (`data.special_tokens_init`) matters more than its few numbers suggest:

- `similar`: the mean of the rows of the ordinary tokens that the new token's own words are written with (of
  <|im_start|>: "im start"). The model meets something it half knows. The default.
- `sample`: a draw from a normal distribution with the mean and the standard deviation of each dimension of all rows:
  as long as the others and each its own, but a stranger.
- `mean`: the mean of all rows, which keeps a new token's probability low (nlp.stanford.edu/~johnhew/vocab-expansion).
  In both matrices at once it has been seen to destabilise training: all new tokens get the very same logit, that of an
  average token, and look the same as input, so that the first steps move them together.

On model=tiny with data=demo and chat-ml (three seeds, lora and full) `mean` began with gradients of 25 to 31 times
unit norm where the others had 4 to 14, and was behind in held-out loss after 20 steps: 3.9 against 3.0 to 3.2 with
lora, 4.3 against 2.4 to 2.8 in full. `similar` and `sample` ended alike there: that model's words mean nothing yet.
"""

import re
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmkit.model.special_tokens import new_tokens
from llmkit.model.structure import token_matrices

CHUNK = 16384  # rows whose float32 copies are held at a time


def add_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, before: PreTrainedTokenizerBase, *, init: str, seed: int
) -> list[int]:
    """Give every token that is new to the model a row in its input and its output matrix; returns the rows' numbers.

    Many models have spare rows at the end of their matrices: these are used before the matrices are enlarged.

    Args:
        before: the model's own tokenizer, which does not know the new tokens.
        init: `similar`, `sample` or `mean`, as above.
        seed: of what is drawn.
    """
    tokens = new_tokens(tokenizer, before)
    if not tokens:
        return []
    present = len(token_matrices(model)[0])
    needed = max(len(tokenizer), *(number + 1 for number in tokens.values()))
    if needed > present:
        model.resize_token_embeddings(needed, mean_resizing=False)
    # Rows that a tokenizer longer than its model lacked come into being here too, and start like the others.
    rows = sorted({*tokens.values(), *range(present, needed)})
    known = torch.tensor([number for number in sorted(set(before.get_vocab().values())) if number < present])
    spelling = {number: spell(token, before, limit=present) for token, number in tokens.items()}
    generator = torch.Generator().manual_seed(seed)
    for matrix in token_matrices(model):
        _initialise(
            matrix.data, rows, known, spelling if init == "similar" else {}, generator if init == "sample" else None
        )
    return rows


def spell(token: str, before: PreTrainedTokenizerBase, *, limit: int) -> list[int]:
    """The ordinary tokens below `limit` that a new token's words are written with: of <|im_start|>, "im start".

    The slash of a closing marker counts as a word, so that </USER> does not start as <USER>. A token without words is
    taken as it stands.
    """
    special = set(before.all_special_ids)
    for text in (" ".join(re.findall(r"[^\W_]+|/", token)), token):
        numbers: list[int] = before(text, add_special_tokens=False)["input_ids"] if text else []
        if numbers := [number for number in numbers if number not in special and number < limit]:
            return numbers
    return []


@torch.no_grad()
def _initialise(
    matrix: torch.Tensor,
    rows: Sequence[int],
    known: torch.Tensor,
    spelling: dict[int, list[int]],
    generator: torch.Generator | None,
) -> None:
    """Set `rows` of `matrix`: to the mean of the rows they are spelt with, else to that of the `known` rows, around
    which `generator`, if there is one, draws."""
    known = known.to(matrix.device)
    mean = _mean(matrix, known, lambda part: part)
    deviation = _mean(matrix, known, lambda part: (part - mean) ** 2).sqrt() if generator else None
    for row in rows:
        value = mean
        if deviation is not None:
            noise = torch.randn(mean.shape, generator=generator)  # on the CPU: the same numbers on every device
            value = mean + deviation * noise.to(mean.device)
        elif written := spelling.get(row):
            value = matrix[torch.tensor(written, device=matrix.device)].float().mean(dim=0)
        matrix[row] = value.to(matrix.dtype)


def _mean(matrix: torch.Tensor, rows: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The mean over `rows` of a function of them, in float32 and in pieces: a large matrix has no float32 copy."""
    total = sum(function(matrix[part].float()).sum(dim=0) for part in rows.split(CHUNK))
    assert isinstance(total, torch.Tensor)
    return total / len(rows)
