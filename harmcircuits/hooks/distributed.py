"""One scoring run shared among the processes of torch.distributed, such as one for each GPU."""

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, distributed

from harmcircuits.circuits.sites import Site
from harmcircuits.hooks.accumulation import Kind
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.objectives import Objective
from harmcircuits.hooks.weights import weights_digest
from harmcircuits.prompts import Batch


def shared_among_processes(accumulate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`accumulate` with the batches shared out: afterwards every process has the sums over all."""

    def accumulate_share(
        bridge: Bridge,
        batches: Sequence[Batch],
        objective: Objective,
        sites: Mapping[str, Site],
        totals: Mapping[str, Tensor],
        kind: Kind,
    ) -> Tensor:
        # Dealt out like cards. Seven batches among three processes:
        #
        #     rank 0    0  3  6
        #     rank 1    1  4
        #     rank 2    2  5
        share = batches[distributed.get_rank() :: distributed.get_world_size()]
        # A process without a batch contributes zeros. It must still take part in every all_reduce
        # below, or the others would wait for it forever.
        loss = torch.zeros((), device=bridge.cfg.device)
        if share:
            loss += accumulate(bridge, share, objective, sites, totals, kind)

        # Every process walks the sites in this order, so the sums meet their like.
        distributed.all_reduce(loss)
        for name in sites:
            distributed.all_reduce(totals[name])
        return loss

    return accumulate_share


def refuse_differences(bridge: Bridge, batches: Sequence[Batch], options: str) -> None:
    """Check that every process was given the same batches, weights and options."""
    digests = {
        "batches": _batches_digest(batches),
        "weights": weights_digest(bridge),
        "options": hashlib.sha256(options.encode()).hexdigest(),
    }
    numbers = [int(digest[:15], base=16) for digest in digests.values()]  # 60 bits fit an int64
    own = torch.tensor(numbers, device=bridge.cfg.device)

    # Every process gets the numbers of all, so that all raise the same error and none waits for
    # another that has ended.
    n_processes = distributed.get_world_size()
    gathered = [torch.empty_like(own) for _ in range(n_processes)]
    distributed.all_gather(gathered, own)

    # [kind, process]: batches, weights and options, each compared with those of process 0.
    by_kind = torch.stack(gathered, dim=1).tolist()
    for kind, values in zip(digests, by_kind, strict=True):
        differing = [rank for rank, value in enumerate(values) if value != values[0]]
        if differing:
            raise ValueError(
                f"processes {differing} of {n_processes} were given other {kind} than process 0; "
                "give every process all the batches, and the same weights and options: each "
                "runs its share by itself"
            )


def _batches_digest(batches: Sequence[Batch]) -> str:
    """The same for the same tokens, targets and padding in the same order."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(f"{tuple(batch.tokens.shape)}".encode())
        for tensor in (batch.tokens, batch.is_target):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
