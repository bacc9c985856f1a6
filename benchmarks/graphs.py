"""What does an epoch on a graph cost, beside PyTorch Geometric? How do time and memory grow with the graph?

    python benchmarks/graphs.py                                        # everything, one and two threads
    python benchmarks/graphs.py race --threads 1 --graphs cora --nets gcn
    python benchmarks/graphs.py race --processor-time                  # on a busy machine
    python benchmarks/graphs.py growth
    python benchmarks/graphs.py race --device gpu --graphs pubmed

"race": an epoch is forward, backward and Adam on the whole graph, width 64, dropout on. Cora and Pubmed are read from
QPDE_DATA_DIR; without it random graphs of their sizes stand in. "qpde" runs its epochs in one compiled scan, from
sparse features. "torch" is benchmarks/torch_graphs.py, eager, in the fastest of its forms, which is named; a second row
of linear networks is for the form "regrouped". Both compute the same logits from the same parameters (checked) and run
in one process, in turns, on as many processors as threads; medians. W4A4: 4-bit weights and activations.

"growth": random graphs with ten edges a node, each in a process of its own, which tells its peak memory. "G^T G x" is
`qpde.graphs.laplacian`, the step one epoch of a PDE-GCN of 8 layers (tanh, W4A4, remat). "temporary" is what the
compiled program needs beside its arguments. Then what depth costs a compiler that scans over the layers.

On a GPU a measured call takes 20 epochs or steps in a row and waits once. PyTorch has second rows, for the fastest of
the forms recorded as CUDA graphs. Logits are compared in full precision; then both sides may round the factors of
products to TF32, JAX's default there. "peak" is the GPU's memory. Compilers of several depths are left out.
"""

import argparse
import itertools
import os
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

WIDTH = 64
# nodes, edges, features, entries of the features, classes, training nodes
SIZES = {"cora": (2708, 5278, 1433, 49216, 7, 140), "pubmed": (19717, 44324, 500, 988031, 3, 60)}
NETS = {
    "gcn": ("gcn", 2, {}),
    "gcnii-16": ("gcnii", 16, {}),
    "gcnii-64": ("gcnii", 64, {}),
} | {
    f"pde-{depth}-{nonlinearity}{suffix}": ("pde_gcn", depth, {"nonlinearity": nonlinearity} | bits)
    for depth in (8, 32)
    for nonlinearity in ("identity", "tanh")
    for suffix, bits in (("", {}), ("-W4A4", {"weight_bits": 4, "act_bits": 4}))
}
EDGES = (100_000, 1_000_000, 10_000_000)
EPOCHS = {"cpu": 5, "gpu": 20}
STEPS = {"cpu": 1, "gpu": 20}
"""In a measured call."""


def main() -> None:
    """Starts one process for each number of threads and each size: pools and peaks belong to a process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("race", "growth", "all"), default="all")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--graphs", nargs="+", default=SIZES, choices=SIZES)
    parser.add_argument("--nets", nargs="+", default=NETS, choices=NETS)
    parser.add_argument("--edges", type=int, nargs="+", default=EDGES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, help="in a measured call; 5, on a GPU 20")
    parser.add_argument("--processor-time", action="store_true", help="count processor time, not the wall clock")
    parser.add_argument("--child", choices=("race", "grow", "compile"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.epochs = options.epochs or EPOCHS[options.device]
    if options.device == "gpu" and options.processor_time:
        parser.error("a GPU's time is not the processor's")
    if options.child:
        sys.path.append(str(Path(__file__).parents[1]))  # train is not installed, it runs from the checkout
        from train.host.allocator import keep_freed_memory

        keep_freed_memory()
        {"race": race, "grow": grow, "compile": compile_depths}[options.child](options)
        return
    if options.part in ("race", "all"):
        for threads in options.threads if options.device == "cpu" else (1,):
            start(options, "race", threads=threads)
    if options.part in ("growth", "all"):
        what = "processor" if options.processor_time else "wall"
        print(
            f"\n{'edges':>10}{'G^T G x':>18}{'step':>18}{'temporary':>21}{'peak':>11}   {what} time, an edge",
            flush=True,
        )
        for edges in options.edges:
            start(options, "grow", edges=edges)
        if options.device == "cpu":
            start(options, "compile")


def start(options, child: str, *, threads: int = 1, edges: int | None = None) -> None:
    """Runs a part of this file on that many processors, or on the GPU and all of them."""
    arguments = ["--child", child, "--device", options.device, "--threads", str(threads)]
    arguments += ["--rounds", str(options.rounds), "--epochs", str(options.epochs)]
    arguments += ["--graphs", *options.graphs, "--nets", *options.nets]
    arguments += ["--edges", str(edges)] if edges else []
    arguments += ["--processor-time"] if options.processor_time else []
    processors = sorted(os.sched_getaffinity(0))
    if options.device == "cpu":
        processors = processors[:threads]
    subprocess.run(
        [sys.executable, __file__, *arguments],
        check=True,
        env={"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ,  # PyTorch needs the GPU's memory, too
        preexec_fn=lambda: os.sched_setaffinity(0, processors),
    )


def race(options) -> None:
    """Every net on every graph, on this process's processors or the GPU."""
    import torch
    import torch_gpu
    from timing import gpu_name, in_a_row, interleaved

    on_gpu = options.device == "gpu"
    if on_gpu:
        where, digits = gpu_name(), 2
        torch_gpu.prepare()
    else:
        (threads,) = options.threads
        where, digits = f"{threads} thread(s)", 1
        torch.set_num_threads(threads)
    torch.sparse.check_sparse_tensor_invariants.disable()
    clock = time.process_time if options.processor_time else time.perf_counter
    what = "processor" if options.processor_time else "wall"
    for name in options.graphs:
        graph = read_graph(name)
        contenders = TorchSide(graph, options.device)
        print(f"\n{name}, {where}, {what} ms an epoch")
        print(f"{'':<24}{'qpde':>9}{'torch':>9}{'qpde/torch':>12}   torch's form", flush=True)
        for net in options.nets:
            model, params = create(net, graph)
            candidates = {"qpde": qpde_epochs(model, params, graph, options.epochs)}
            expected = logits(model, params, graph)
            groups = (("edges", "matrices"), ("regrouped",)) if is_linear(net) else (("edges", "matrices"),)
            for recorded, forms in itertools.product((False, True) if on_gpu else (False,), groups):
                for form, epoch in contenders.fastest(net, forms, params, expected, clock, recorded=recorded).items():
                    candidates[form] = in_a_row(epoch, options.epochs, contenders.wait)
            seconds = interleaved(candidates, rounds=options.rounds, warmup=1, clock=clock)
            milliseconds = {name: 1e3 * statistics.median(t) / options.epochs for name, t in seconds.items()}
            ours = milliseconds.pop("qpde")
            for form, theirs in milliseconds.items():
                print(f"{net:<24}{ours:9.{digits}f}{theirs:9.{digits}f}{ours / theirs:12.2f}   {form}", flush=True)


def is_linear(net: str) -> bool:
    """Whether the hidden layers are linear maps, which can be regrouped."""
    return NETS[net][2] == {"nonlinearity": "identity"}


def read_graph(name: str):
    """The citation graph, or a random one of its size."""
    import numpy as np

    from qpde.datasets import NodeGraph, SparseRows, load_planetoid

    root = os.environ.get("QPDE_DATA_DIR")
    if root:
        return load_planetoid(name, root)
    nodes, edges, features, entries, classes, train = SIZES[name]
    rng = np.random.default_rng(0)

    def distinct(count, rows, columns):
        keys = np.unique(rng.integers(0, rows * columns, count))
        return (keys // columns).astype(np.int32), (keys % columns).astype(np.int32)

    ends = np.sort(distinct(edges, nodes, nodes), axis=0)
    row, column = distinct(entries, nodes, features)
    return NodeGraph(
        *np.unique(ends[:, ends[0] < ends[1]], axis=1),
        features=SparseRows(row, column, rng.random(len(row), np.float32) / (entries / nodes)),
        labels=rng.integers(0, classes, nodes).astype(np.int32),
        train=np.arange(train, dtype=np.int32),
        validation=np.arange(train, train + 500, dtype=np.int32),
        test=np.arange(nodes - 1000, nodes, dtype=np.int32),
        num_features=features,
        num_classes=classes,
    )


def create(net: str, graph):
    """The network and random parameters."""
    import jax

    from qpde import models

    name, layers, more = NETS[net]
    if name == "pde_gcn":
        more = more | {"kernel_init": "orthogonal"}  # the identity would hide errors
    model = models.create(name, num_classes=graph.num_classes, layers=layers, width=WIDTH, dropout=0.5, **more)
    return model, jax.jit(model.init)(jax.random.key(0), graph.to_jraph())["params"]


def logits(model, params, graph):
    """What PyTorch's networks must compute too, in full precision."""
    import jax
    import numpy as np

    with jax.default_matmul_precision("highest"):
        return np.array(jax.jit(model.apply)({"params": params}, graph.to_jraph()))


def compiled_epochs(model, graph, nodes, labels, params, *, epochs: int):
    """The first state of training, and the program (state, graph, key) -> (state, losses) for that many epochs."""
    import jax
    import jax.numpy as jnp
    import optax

    optimizer = optax.adam(0.01)

    def loss(params, graph, key):
        logits = model.apply({"params": params}, graph, train=True, rngs={"dropout": key})
        return optax.softmax_cross_entropy_with_integer_labels(logits[nodes], labels).mean()

    def train(state, graph, key):
        def epoch(state, key):
            params, moments = state
            value, gradient = jax.value_and_grad(loss)(params, graph, key)
            updates, moments = optimizer.update(gradient, moments, params)
            return (optax.apply_updates(params, updates), moments), value

        return jax.lax.scan(epoch, state, jax.random.split(key, epochs))

    state = jax.tree.map(jnp.array, (params, optimizer.init(params)))
    return state, jax.jit(train, donate_argnums=0).lower(state, graph, jax.random.key(0)).compile()


def qpde_epochs(model, params, graph, epochs: int):
    """A callable that trains that many epochs further."""
    labels = graph.labels[graph.train]
    graph, nodes = graph.to_jraph(), graph.train
    state, train = compiled_epochs(model, graph, nodes, labels, params, epochs=epochs)
    return repeated(train, state, graph)


def repeated(train, state, graph):
    """A callable that carries the state from call to call."""
    import jax

    keys = iter(jax.random.split(jax.random.key(1), 1000))

    def advance():
        nonlocal state
        state, losses = train(state, graph, next(keys))
        return losses

    return advance


class TorchSide:
    """One graph with its features in all forms that PyTorch may take, on the processor or the GPU."""

    def __init__(self, graph, device: str):
        import torch
        import torch_graphs

        self.device, self.wait = ("cuda", torch.cuda.synchronize) if device == "gpu" else ("cpu", lambda: None)
        self.trial = EPOCHS["cpu"] if device == "gpu" else 1  # epochs

        entries, shape = graph.features, (graph.num_nodes, graph.num_features)
        self.graph = graph
        features = {
            "sparse": torch_graphs.Sparse(entries.row, entries.column, entries.value, shape),
            "dense": torch.from_numpy(graph.dense_features()),
        }
        self.features = {kind: value.to(self.device) for kind, value in features.items()}
        self.graphs = {
            form: torch_graphs.Graph(graph.senders, graph.receivers, graph.num_nodes, form).to(self.device)
            for form in ("edges", "matrices", "regrouped")
        }
        self.nodes = torch.from_numpy(graph.train).long().to(self.device)
        self.labels = torch.from_numpy(graph.labels[graph.train]).long().to(self.device)

    def fastest(self, net: str, forms: tuple[str, ...], params, expected, clock, *, recorded: bool = False) -> dict:
        """Name and epoch of the form whose epoch is the shortest; none if none can be recorded."""
        import torch
        import torch_gpu
        import torch_graphs
        from timing import in_a_row

        seconds, epochs = {}, {}
        for form, kind in itertools.product(forms, self.features):
            name, graph, features = f"{form}, {kind} features", self.graphs[form], self.features[kind]
            network = torch_graphs.create(*NETS[net], graph=self.graph, width=WIDTH, dropout=0.5).load(params)
            check_parity(network.to(self.device), features, graph, expected)
            optimizer = torch.optim.Adam(network.train().parameters(), lr=0.01, capturable=recorded)
            epoch = partial(torch_graphs.train_epoch, network, optimizer, features, graph, self.nodes, self.labels)
            if recorded:
                name += ", recorded"
                epoch = torch_gpu.recorded(name, epoch)
                if epoch is None:
                    continue
            trial = in_a_row(epoch, self.trial, self.wait)
            times = []
            for _ in range(3):
                start = clock()
                trial()
                times.append(clock() - start)
            seconds[name], epochs[name] = min(times), epoch
        best = min(seconds, key=seconds.get, default=None)
        return {best: epochs[best]} if best else {}


def check_parity(network, features, graph, expected) -> None:
    """Both sides compute the same logits. The median: one flipped rounding must not hide what the rest does."""
    import torch
    import torch_gpu
    from torch_nets import relative_error

    torch_gpu.allow_tf32(False)
    with torch.no_grad():
        error = relative_error(network.eval()(features, graph).cpu(), expected)
    torch_gpu.allow_tf32(True)
    if error > 1e-5:
        raise AssertionError(f"PyTorch's logits differ by {error:.1e} of the largest")


def grow(options) -> None:
    """Time and memory on one random graph."""
    import jax
    import numpy as np
    from timing import gpu_name, in_a_row, interleaved

    from qpde import graphs, models

    if options.device == "gpu":
        gpu_name()
    steps = STEPS[options.device]
    (edges,) = options.edges
    nodes = edges // 10
    rng = np.random.default_rng(0)
    ends = rng.integers(0, nodes, (2, edges))
    x = rng.standard_normal((nodes, WIDTH), np.float32)
    graph = graphs.from_edges(*ends, num_nodes=nodes, nodes=x)
    del ends, x
    edges = len(graph.senders)  # without loops and duplicates
    clock = time.process_time if options.processor_time else time.perf_counter

    laplacian = jax.jit(lambda graph: graphs.laplacian(graph, graph.nodes)).lower(graph).compile()
    model = models.create(
        "pde_gcn", num_classes=7, width=WIDTH, nonlinearity="tanh", weight_bits=4, act_bits=4, remat=True
    )
    params = jax.jit(model.init)(jax.random.key(0), graph)["params"]
    labelled = np.arange(nodes, step=100)
    state, train = compiled_epochs(model, graph, labelled, labelled % 7, params, epochs=1)
    candidates = {
        "G^T G x": in_a_row(lambda: laplacian(graph), steps),
        "step": in_a_row(repeated(train, state, graph), steps),
    }
    seconds = interleaved(candidates, rounds=options.rounds, warmup=1, clock=clock)
    first, step = (statistics.median(values) / steps for values in seconds.values())
    temporary = train.memory_analysis().temp_size_in_bytes
    digits = 0 if options.device == "cpu" else 2
    columns = [f"{1e3 * t:9.{max(digits, 1)}f} ms {1e9 * t / edges:5.{digits}f} ns" for t in (first, step)]
    columns.append(f"{temporary / 2**20:11.0f} MiB {temporary / edges:3.0f} B")
    print(f"{edges:10d}{''.join(columns)}{peak_memory(options.device) / 2**30:7.2f} GiB", flush=True)


def peak_memory(device: str) -> float:
    """Bytes that this process has held at once; not a number where the GPU does not tell."""
    import jax

    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", float("nan"))


def compile_depths(options) -> None:
    """Seconds to trace and compile training at several depths."""
    graph = read_graph("cora")
    print(f"\n{'pde_gcn, tanh, W4A4':<24}{'compile s':>12}")
    for layers in (8, 64):
        NETS["deep"] = ("pde_gcn", layers, {"nonlinearity": "tanh", "weight_bits": 4, "act_bits": 4})
        model, params = create("deep", graph)
        start = time.perf_counter()
        compiled_epochs(model, graph.to_jraph(), graph.train, graph.labels[graph.train], params, epochs=options.epochs)
        print(f"{f'{layers} layers':<24}{time.perf_counter() - start:12.1f}", flush=True)


if __name__ == "__main__":
    main()
