"""A model of transformers in DistributedDataParallel on two processes, with this package's loss, as a program.

python tests/tools/data_parallel.py PORT {logits,linear}

Each rank has one row of a batch. Its gradients must be the mean of the ranks', computed by transformers' own loss.
"""

import sys

import torch
import transformers
from torch.nn.parallel import DistributedDataParallel

from softmax_ext.integrations import transformers as integration

RANKS = 2


def model() -> torch.nn.Module:
    torch.manual_seed(1)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=4)).train()


def row(rank: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, 97, (RANKS, 12), generator=torch.Generator().manual_seed(2))[rank : rank + 1]
    return {"input_ids": tokens, "labels": tokens}


def expected() -> list[torch.Tensor]:
    one = model()
    for rank in range(RANKS):
        (one(**row(rank)).loss / RANKS).backward()
    return [parameter.grad for parameter in one.parameters()]


def on_rank(rank: int, port: str, linear: bool) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=RANKS, rank=rank)
    one = integration.apply(model(), linear=linear)
    parallel = DistributedDataParallel(one)
    outputs = parallel(**row(rank))
    assert (outputs.logits is None) == linear
    outputs.loss.backward()
    for parameter, right in zip(one.parameters(), expected(), strict=True):
        torch.testing.assert_close(parameter.grad, right, rtol=1e-4, atol=1e-6)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(on_rank, (sys.argv[1], sys.argv[2] == "linear"), nprocs=RANKS)
    print("the gradients are the mean")
