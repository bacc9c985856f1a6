"""PyTorch on a GPU, as the races need it: precision as in JAX, and steps recorded as CUDA graphs."""

from collections.abc import Callable

import torch


def prepare() -> None:
    """What XLA does by default: TF32 in products and convolutions, and the fastest of cuDNN's algorithms."""
    allow_tf32(True)
    torch.backends.cudnn.benchmark = True


def allow_tf32(allow: bool) -> None:
    """Whether factors of float32 products and convolutions may be rounded to TF32."""
    torch.backends.cuda.matmul.allow_tf32 = allow
    torch.backends.cudnn.allow_tf32 = allow


def recorded(name: str, step: Callable, warmup: int = 5) -> Callable | None:
    """The same step as a CUDA graph, which is replayed without launching its kernels one by one.

    Takes steps to warm up, on a stream of their own, as PyTorch's documentation asks for. None, and a line that says
    why, where the step cannot be recorded.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        # JAX has threads of its own here: what they ask of the card must not end the recording.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = step()
    except RuntimeError as error:
        print(f"{name} cannot be recorded: {str(error).splitlines()[0]}", flush=True)
        # The failed recording leaves the generator of random numbers waiting for its end.
        torch.cuda.default_generators[0].graphsafe_set_state(torch.Generator("cuda").graphsafe_get_state())
        return None

    def replay():
        graph.replay()
        return result

    replay.step = step  # the recording points into its tensors, which must live as long
    return replay
