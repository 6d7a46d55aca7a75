"""Run by test_train under horovodrun: gradients that a pass hands in, as job.fast does, averaged over the ranks."""

import sys

import horovod.torch as hvd
import torch

from job.network.sgd import MomentumSGD
from job.ranks.average import Gradients


def main(wire: str) -> None:
    hvd.init()
    layers = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.Linear(20, 3))
    optimizer = MomentumSGD(layers.parameters(), lr=1.0, momentum=0.0)
    strategy = Gradients(layers, optimizer, wire, autograd=False)
    flat = torch.zeros(sum(p.numel() for p in layers.parameters()))
    sizes = [p.numel() for p in layers.parameters()]
    for p, part in zip(layers.parameters(), flat.split(sizes), strict=True):
        p.grad = part.view(p.shape)
    tail, head = flat.split([sum(sizes[:2]), sum(sizes[2:])])
    for step in range(3):
        mean = []
        for number, p in enumerate(layers.parameters()):
            each = [torch.full_like(p, 0.1 * (number + 1) * (rank + 1) + step) for rank in range(hvd.size())]
            p.grad.copy_(each[hvd.rank()])
            mean.append(sum(each) / hvd.size())
        places = [p.grad.data_ptr() for p in layers.parameters()]
        before = [p.detach().clone() for p in layers.parameters()]
        strategy.reduce(head)
        strategy.reduce(tail)
        strategy.communicate()
        strategy.update()
        tolerance = 1e-6 if wire == "fp32" else 2e-3
        for p, place, old, expected in zip(layers.parameters(), places, before, mean, strict=True):
            assert p.grad.data_ptr() == place  # graphs have recorded it
            torch.testing.assert_close(p.grad, expected, rtol=tolerance, atol=0)
            torch.testing.assert_close(p.detach(), old - expected, rtol=2 * tolerance, atol=2 * tolerance)
    if hvd.rank() == 0:
        print("averaged")


if __name__ == "__main__":
    main(sys.argv[1])
