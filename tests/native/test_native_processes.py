"""Python threads, forks, data loader workers, and interpreter exit."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from tests.native.common import lengths_mask, network, run, states
from trm_kernels import latent_recursion

QUIET = {"PYTHONWARNINGS": "ignore"}


@pytest.mark.parametrize("own_threads", [1, 2])
def test_several_python_threads_at_once(own_threads: int) -> None:
    """The kernels run without the GIL: training and inference on one network."""
    net, inputs = network("scratch", 40, 2, layers=2), [states(3, 33, 40) for _ in range(4)]
    mask = lengths_mask((33, 2, 20), 33)

    def work(given: list[Tensor]) -> list[Tensor]:
        torch.set_num_threads(own_threads)  # for this Python thread
        leaves = [state.clone().requires_grad_() for state in given]
        y, z = latent_recursion(net, *leaves, 2, mask=mask)
        gradients = torch.autograd.grad((y, z), [*leaves, *net.parameters()], [given[0], given[1]])
        with torch.no_grad():
            return [y.detach(), z.detach(), *gradients, latent_recursion(net, *given, 2, mask=mask)[0]]

    before = torch.get_num_threads()
    try:
        expected = [work(given) for given in inputs]
        with ThreadPoolExecutor(4) as pool:
            for _ in range(5):
                for found, truth in zip(pool.map(work, inputs), expected, strict=True):
                    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, truth, strict=True))
    finally:
        torch.set_num_threads(before)


def test_one_packed_network_in_several_python_threads() -> None:
    net, x = network("seed", 40, 2).eval(), torch.randn(3, 33, 40)

    def work(_: int) -> Tensor:
        with torch.no_grad():
            return net(x)

    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(work, range(32))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("count", [1, 2])
def test_a_forked_child_computes_the_same(count: int) -> None:
    """libgomp's threads stay in the parent, and a child that waits for them would hang."""
    code = f"""
import os, signal
import torch
from trm_kernels import TinyRecursiveNetwork, latent_recursion
torch.set_num_threads({count})
net = TinyRecursiveNetwork(16, 1, 2, backend="native")
x = torch.randn(3, 33, 16)

def compute():
    net.zero_grad()
    y, z = latent_recursion(net, x, x, x, 1)
    (y.square().sum() + z.square().sum()).backward()
    with torch.no_grad():
        return [y.detach(), net(x), *(parameter.grad.clone() for parameter in net.parameters())]

expected = compute()
for _ in range(2):
    child = os.fork()
    if child == 0:
        signal.alarm(8)
        try:
            close = all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(compute(), expected))
            os._exit(0 if close and torch.equal(compute()[0], expected[0]) else 3)
        except BaseException:
            os._exit(4)
    print(os.waitpid(child, 0)[1])
assert all(torch.equal(a, b) for a, b in zip(compute(), expected))
"""
    assert run(code, OMP_NUM_THREADS=str(count), **QUIET).split() == ["0", "0"]


def test_workers_of_a_data_loader() -> None:
    code = """
import torch
from torch.utils.data import DataLoader, Dataset
from trm_kernels import TinyRecursiveNetwork
torch.set_num_threads(2)
net = TinyRecursiveNetwork(16, 1, 2, backend="native").eval()
inputs = torch.randn(6, 33, 16)

class Embedded(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        with torch.no_grad():
            return net(inputs[i : i + 1])[0]

with torch.no_grad():
    expected = net(inputs)
loader = DataLoader(Embedded(), batch_size=2, num_workers=2, timeout=20, multiprocessing_context="fork")
print(torch.equal(torch.cat(list(loader)), expected))
"""
    assert run(code, **QUIET) == "True\n"


def test_a_graph_that_lives_until_exit_is_not_reported_as_a_leak() -> None:
    """nanobind would print warnings at interpreter exit, which ``run`` does not allow."""
    code = """
import torch
from trm_kernels import TinyRecursiveNetwork, deep_recursion
net = TinyRecursiveNetwork(16, 1, 2)
x = torch.randn(2, 5, 16)
y, z = deep_recursion(net, x, x, x, 1, 1)
print(net.selected_backend(x).name)
"""
    assert run(code) == "native\n"


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="reads /proc")
def test_torchs_number_of_threads_is_ours() -> None:
    """The operating system's count of threads shows those that a call has started."""
    code = """
import os, torch
torch.set_num_threads(1)
from trm_kernels import TinyRecursiveNetwork
net = TinyRecursiveNetwork(16, 1, 2, backend="native").eval()
x = torch.randn(4, 64, 16)
before = len(os.listdir("/proc/self/task"))
for count in (1, 2, 3):
    torch.set_num_threads(count)
    with torch.no_grad():
        net(x)
    print(len(os.listdir("/proc/self/task")) - before)
"""
    assert run(code, OMP_NUM_THREADS="1").split() == ["0", "1", "2"]
