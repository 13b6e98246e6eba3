"""One scoring run shared among the processes of torch.distributed, to the bit what one process would give.

Sums of float32 depend on their order. So processes divide the passes, not the sums: each runs every n-th batch, and each
matrix has one process that adds up its gradients, batch after batch as a process alone would. What travels are the two
factors of a gradient, the matrix's input and the gradient of its output, which are far smaller than the matrix.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from harmcircuits.prompts import Batch


class Processes:
    """This process and the others, or this one alone where torch.distributed is not initialised.

    All must do the same in the same order. `device`: of the model's tensors, which the backend must be able to send
    (gloo: CPU, nccl: CUDA).
    """

    def __init__(self, names: Sequence[str], device: Any) -> None:
        self.is_shared = distributed.is_initialized()
        self.rank = distributed.get_rank() if self.is_shared else 0
        self.size = distributed.get_world_size() if self.is_shared else 1
        self.device, self._n_busy = device, 1
        self._owner = {name: number % self.size for number, name in enumerate(names)}

    def owns(self, name: str) -> bool:
        """Whether this process adds up the gradients of a matrix."""
        return self._owner[name] == self.rank

    def turns(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        """The batches of this process. In the last turn, one for which none is left repeats the first, unheard."""
        for start in range(0, len(batches), self.size):
            self._n_busy = min(self.size, len(batches) - start)
            yield batches[start + self.rank if self.rank < self._n_busy else 0]

    def factors(self, name: str, *own: Tensor) -> Iterator[Sequence[Tensor]]:
        """At a matrix's owner what each process gives in this turn, in the order of the batches; elsewhere nothing."""
        owner, own = self._owner[name], tuple(tensor.contiguous() for tensor in own)  # as they arrive: strides change bits
        if self.rank != owner:
            if self.rank < self._n_busy:
                for tensor in own:
                    shape = [*tensor.shape, *[0] * (3 - tensor.ndim)]
                    distributed.send(torch.tensor(shape, device=tensor.device), owner)
                    distributed.send(tensor, owner)
            return
        for rank in range(self._n_busy):
            yield own if rank == owner else [self._received(tensor, rank) for tensor in own]

    def _received(self, like: Tensor, rank: int) -> Tensor:
        shape = torch.empty(3, dtype=torch.int64, device=like.device)
        distributed.recv(shape, rank)
        tensor = like.new_empty([size for size in shape.tolist() if size])
        distributed.recv(tensor, rank)
        return tensor

    def spread(self, name: str, value: Tensor) -> Tensor:
        """The owner's value, written into that of every process."""
        if self.is_shared:
            distributed.broadcast(value, self._owner[name])
        return value

    def refuse_differences(self, given: Mapping[str, str]) -> None:
        """ValueError, in every process, where one was given something else: what it is called and a text that says it."""
        digests = [int(hashlib.sha256(text.encode()).hexdigest()[:15], 16) for text in given.values()]
        mine = torch.tensor(digests, device=self.device)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        distributed.all_gather(everyone, mine)
        for name, values in zip(given, torch.stack(everyone).T.tolist(), strict=True):
            if len(set(values)) > 1:
                odd = [rank for rank, value in enumerate(values) if value != values[0]]
                raise ValueError(
                    f"processes {odd} of {self.size} were given other {name} than process 0; give all the same, each takes "
                    "its share by itself"
                )


def batches_text(batches: Sequence[Batch]) -> str:
    """A text that is the same for the same batches: tokens, targets, padding and their order."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(f"{tuple(batch.tokens.shape)}".encode())
        digest.update(
            batch.tokens.cpu().contiguous().numpy().tobytes() + batch.is_target.cpu().contiguous().numpy().tobytes()
        )
    return digest.hexdigest()
