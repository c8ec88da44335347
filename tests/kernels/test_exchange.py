"""Ulysses' exchange: two processes' tokens and heads change places, and back, as it is written and read in place."""

from __future__ import annotations

import pytest
import torch

from fluxrun.kernels.transformer.exchange import Exchange


class Simulated(Exchange):
    """An exchange whose other processes are in this one: what each sends is put down, and then given to all."""

    def use(self, rank: int, sent: list[torch.Tensor]) -> Simulated:
        self.__dict__.update(rank=rank, sent=sent)
        return self

    def _exchanged(self, sent: torch.Tensor) -> torch.Tensor:
        return torch.stack([one[self.__dict__["rank"]] for one in self.__dict__["sent"]])


@pytest.mark.parametrize("batch", [1, 2])
def test_tokens_and_heads_change_places(batch: int) -> None:
    processes, tokens, heads, size = 2, 6, 4, 8
    whole = torch.randn(3, batch, processes * tokens, heads, size)  # q, k and v
    sent = []
    for rank in range(processes):
        room, views = Exchange(None, processes).room((batch, tokens, heads, size), torch.float32, torch.device("cpu"))  # type: ignore[arg-type]
        for view, part in zip(views, whole[:, :, rank * tokens : (rank + 1) * tokens], strict=True):
            assert len({one.stride() for one in views}) == 1
            view.copy_(part.unflatten(2, (processes, -1)))
        sent.append(room)
    exchanges = [Simulated(None, processes).use(rank, sent) for rank in range(processes)]  # type: ignore[arg-type]
    attended = []
    for rank, exchange in enumerate(exchanges):
        arrived = exchange.by_heads(sent[rank])
        for found, part in zip(arrived, whole[..., rank * 2 : rank * 2 + 2, :], strict=True):
            assert found.stride()[-1] == 1
            assert torch.equal(found, part)
        attended.append(arrived[2].contiguous())  # as if attention gave back the values
    rows = [one.transpose(0, 1).contiguous().unflatten(0, (processes, -1)) for one in attended]
    for rank, exchange in enumerate(exchanges):
        back = exchange.use(rank, rows).by_tokens(attended[rank])
        assert torch.equal(back.flatten(2, 3), whole[2, :, rank * tokens : (rank + 1) * tokens])
