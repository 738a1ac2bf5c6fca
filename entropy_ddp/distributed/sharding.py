"""A model whose layers no rank holds whole: each is gathered from all ranks when it runs.

`fully_shard` (FSDP2) cuts every parameter of a layer along its first dimension, a part
for each rank; before the layer runs forward, and again before it runs backward, the
parts are gathered, and afterwards dropped. Within the layer tensors are plain, so that
forward mode knows nothing of it.

A gather is a collective: all ranks must make the same ones in the same order. So they
pass over the model in rounds. A round is one microbatch on every rank; a rank that has
none left passes over a spare row, and one that has run out of memory takes part in the
gathers of the round that it has not come to. Which gathers a round makes is recorded in
the first one, and every later round is held against it.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from entropy_ddp.distributed.world import World
from entropy_ddp.errors import InputError, RunError
from entropy_ddp.memory import is_shortage

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Returned = TypeVar("Returned")


class WholeLayers:
    """Every rank has all layers: it runs as many passes as it has work for."""

    is_sharded = False

    def is_work_left(self, on_this_rank: bool) -> bool:
        """Whether a rank has a microbatch left to pass over."""
        return on_this_rank

    def most(self, on_this_rank: int) -> int:
        """How many passes every rank has to make, so that none makes more."""
        return on_this_rank

    def together(self, call: Callable[[], Returned], backward: bool) -> Returned:
        """What a call gives that passes over one microbatch."""
        return call()

    def recover(self) -> None:
        """Make the model ready again after a call that ran out of memory."""

    def serving(
        self, model: nn.Module, spare: Callable[[], object]
    ) -> AbstractContextManager[None]:
        """A context in which ranks call the model as often as they like."""
        return nullcontext()

    def gathered(
        self, named: Iterable[tuple[str, Tensor]]
    ) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors, one at a time."""
        yield from named

    @property
    def gathered_bytes(self) -> int:
        """Bytes of the largest layer that is gathered; 0 where none is."""
        return 0


class ShardedLayers(WholeLayers):
    """The layers of a model, each in parts on the ranks.

    Args:
        layers: modules that `fully_shard` has been applied to, each a root of its own.
        world: the ranks.
    """

    is_sharded = True

    def __init__(self, layers: list[nn.Module], world: World) -> None:
        self._layers, self._world = layers, world
        # Of a round forward only, and of one with a backward pass: (layer, step), in
        # order, as the first round of the kind made them.
        self._recorded: dict[bool, list[tuple[int, str]]] = {}
        self._expected: deque[tuple[int, str]] | None = None
        self._made: list[tuple[int, str]] = []
        self._is_in_round = self._is_gathering = False
        self._bytes = max(sum(map(_whole_bytes, m.parameters())) for m in layers)
        for number, layer in enumerate(layers):
            self._watch(number, layer)

    def is_work_left(self, on_this_rank: bool) -> bool:
        """Whether any rank has a microbatch left; one collective."""
        return bool(self._world.max(float(on_this_rank)))

    def most(self, on_this_rank: int) -> int:
        """Largest number of passes over ranks; one collective."""
        return int(self._world.max(float(on_this_rank)))

    def together(self, call: Callable[[], Returned], backward: bool) -> Returned:
        """What a call gives that passes over one microbatch, on every rank one.

        Args:
            call: passes forward over all layers.
            backward: whether it passes backward too.

        Raises:
            RunError: it made other gathers than the first round did, ran out of memory
                within a gather, or a rank did not come to one in time.
        """
        recorded = self._recorded.get(backward)
        self._expected = None if recorded is None else deque(recorded)
        self._made, self._is_in_round, self._is_gathering = [], True, False
        try:
            with self._world.late_ranks_named():
                result = call()
        except Exception as error:
            self._is_in_round = False
            if not is_shortage(error):
                self._reset()
            raise
        self._is_in_round = False
        if recorded is None:
            self._recorded[backward] = self._made
        elif self._expected:
            self._refuse_order(None)
        return result

    def recover(self) -> None:
        """Take part in the gathers of the round that this rank has not come to.

        Raises:
            RunError: memory ran out within a gather, or before the first round was done.
        """
        left = self._expected
        if left is None or self._is_gathering or not self._can_reset():
            raise RunError(
                "out of memory while a layer was gathered from all ranks, or before the "
                "model ran once; free memory on this device, lower "
                "compute.tokens_per_microbatch, or use more ranks"
            )
        self._reset()
        with self._world.late_ranks_named():
            for number, _ in left:
                self._world.come_to_collective()
                layer: Any = self._layers[number]
                layer.unshard()
                layer.reshard()

    @contextmanager
    def serving(self, model: nn.Module, spare: Callable[[], object]) -> Iterator[None]:
        """A context in which every call of the model is a round, on any rank.

        At its end a rank takes part in the others' rounds until all are there.

        Args:
            model: has the layers; its `forward` is replaced meanwhile.
            spare: calls the layers once.
        """
        own = model.forward

        @wraps(own)
        def forward(*inputs: Any, **options: Any) -> Any:
            self.is_work_left(True)
            return self.together(lambda: own(*inputs, **options), backward=False)

        model.forward = forward
        try:
            yield
            model.forward = own
            while self.is_work_left(False):
                self.together(spare, backward=False)
        finally:
            # The instance's attribute; the class's own is seen again.
            del model.forward

    def gathered(
        self, named: Iterable[tuple[str, Tensor]]
    ) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors, one at a time: every rank must ask for the same ones."""
        from torch.distributed.tensor import DTensor

        for name, tensor in named:
            if isinstance(tensor, DTensor):
                with self._world.late_ranks_named():
                    self._world.come_to_collective()
                    tensor = tensor.detach().full_tensor()
            yield name, tensor

    @property
    def gathered_bytes(self) -> int:
        """Bytes of the largest layer, all of which a rank has while it runs."""
        return self._bytes

    def _can_reset(self) -> bool:
        # torch 2.8 cannot make a layer forget a backward pass that was not finished.
        started = {step for _, step in self._made}
        return "backward" not in started or hasattr(self._layers[0], _RESET)

    def _reset(self) -> None:
        for layer in self._layers:
            getattr(layer, _RESET, layer.reshard)()  # type: ignore[operator]

    def _watch(self, number: int, layer: nn.Module) -> None:
        """Note a layer's gathers: before and after FSDP's own hooks make them."""

        def before(step: str) -> Callable[..., None]:
            return lambda *_: self._begin_gather(number, step)

        def after(step: str) -> Callable[..., None]:
            return lambda *_: self._end_gather(number, step)

        def hooked(hook: Callable[..., None]) -> Callable[..., None]:
            def register(_module: Any, _inputs: Any, output: Any) -> None:
                for tensor in output if isinstance(output, tuple | list) else (output,):
                    if isinstance(tensor, Tensor) and tensor.requires_grad:
                        tensor.register_hook(hook)

            return register

        layer.register_forward_pre_hook(before("forward"), prepend=True)
        layer.register_forward_pre_hook(after("forward"))
        # FSDP gathers for the backward pass in a hook on the output, in between.
        layer.register_forward_hook(hooked(before("backward")), prepend=True)
        layer.register_forward_hook(hooked(after("backward")))

    def _begin_gather(self, number: int, step: str) -> None:
        if not self._is_in_round:
            return
        if (number, step) in self._made and step == "backward":
            # By another output of the same layer, which is whole already.
            return
        self._world.come_to_collective()
        if self._expected is not None and (
            not self._expected or self._expected[0] != (number, step)
        ):
            self._refuse_order((number, step))
        self._is_gathering = True

    def _end_gather(self, number: int, step: str) -> None:
        if not self._is_gathering:
            return
        self._is_gathering = False
        self._made.append((number, step))
        if self._expected is not None:
            self._expected.popleft()

    def _refuse_order(self, found: tuple[int, str] | None) -> None:
        expected = self._expected[0] if self._expected else None
        raise RunError(
            "the layers of the model did not run as in the first pass: expected "
            f"{_told(expected)}, found {_told(found)}; a model whose layers run in an "
            "order that depends on the tokens cannot be sharded: set compute.shard: none"
        )


# Not in every version of torch.
_RESET = "reset_iter_state"


def _told(gather: tuple[int, str] | None) -> str:
    return "the end" if gather is None else f"layer {gather[0] + 1} {gather[1]}"


def _whole_bytes(parameter: Tensor) -> int:
    return parameter.numel() * parameter.element_size()


def shard_base(
    layers: list[nn.Module], world: World, device: torch.device, group: int
) -> ShardedLayers:
    """Shard the frozen matrices of these layers; what else they have stays whole.

    Whole on every rank are what is trained, norms and biases, and parameters of another
    dtype than most.

    Args:
        layers: of the model, in any order; those of nobody are gathered together.
        device: of this rank's model.
        group: number of ranks that share the model between them.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = _mesh(world, device, group)
    for layer in layers:
        frozen = [p for p in layer.parameters() if not p.requires_grad and p.dim() > 1]
        dtypes = [p.dtype for p in frozen]
        usual = max(dtypes, key=dtypes.count, default=None)
        cut = {id(p) for p in frozen if p.dtype == usual}
        whole = {p for p in layer.parameters() if id(p) not in cut}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    return ShardedLayers(layers, world)


def _mesh(world: World, device: torch.device, group: int) -> "DeviceMesh":
    """The ranks, in groups of so many: between groups the parts are repeated."""
    from torch.distributed.device_mesh import init_device_mesh

    if group == world.world_size:
        return init_device_mesh(device.type, (group,))
    shape = (world.world_size // group, group)
    return init_device_mesh(device.type, shape, mesh_dim_names=("repeated", "sharded"))


def group_size(asked: str | int, world: World, ranks_here: int) -> int:
    """How many ranks share one model between them.

    Args:
        asked: `compute.shard_group`: all, node, or a number.
        ranks_here: number of ranks on this machine.

    Raises:
        InputError: the ranks cannot be divided into such groups.
    """
    found = {"all": world.world_size, "node": ranks_here}
    size = asked if isinstance(asked, int) else found[asked]
    if size > world.world_size or world.world_size % size:
        raise InputError(
            f"compute.shard_group: {asked}: expected groups of equal size, found "
            f"{world.world_size} ranks and groups of {size}; start a multiple of {size} "
            "ranks, or set compute.shard_group: all"
        )
    return size
