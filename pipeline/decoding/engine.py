"""The decoding engine, for teachers and students alike: prompts in pieces, then one captured graph a token.

A step of a model of 32 layers starts some thousand kernels, each of which takes a GPU less time than the host needs to
start it. On CUDA a step is therefore captured once and replayed, over keys, values and states that stay where they
are; elsewhere it runs as it is. Tokens come to the host one step behind the device, which never waits.
"""

import functools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from pipeline.decoding.attention import attends_here, engine_attention
from pipeline.decoding.programs import FusedDecoder, fused_decoder
from pipeline.decoding.prompts import Embedded, embedded, piece_length
from pipeline.decoding.room import Cursor, forget, static_cache
from pipeline.models import decoder, logits_head
from pipeline.ops.backends import step_ops
from pipeline.ops.stepping import StepOps

# A captured step is tried as often before, so that everything that is made at first use is there.
WARM_STEPS = 2
# Kinds of rotary positions whose frequencies follow the length, which the host must look at.
HOST_ROTARY = ("dynamic", "longrope")


class Room:
    """The memory of a batch, and the captured step; B rows.

    ``token`` [B] is the last token of each row, ``positions`` [B, 1] or [axes, B, 1] that token's position.
    """

    def __init__(self, cursor: Cursor, cache: Cache, slots: int, positions: Tensor) -> None:
        self.cursor, self.cache, self.slots = cursor, cache, slots
        self.token = torch.zeros_like(cursor.first)
        self.positions = torch.zeros_like(positions[..., :1])
        self.fused: FusedDecoder | None = None
        self.graph: torch.cuda.CUDAGraph | None = None

    def fits(self, slots: int, positions: Tensor) -> bool:
        """Whether a batch with these positions [..., B, L] and so many slots has room here."""
        once = isinstance(self.cache, DynamicCache)
        return not once and self.slots >= slots and self.positions.shape == positions[..., :1].shape


class DecodingEngine:
    """Greedy at temperature 0, else drawn from the whole distribution at that temperature.

    Of the model's own generation settings none apply: what is decoded is the model's distribution. A model whose
    attention is its own affair steps through its own code, over a cache of transformers'.
    """

    def __init__(self, model: PreTrainedModel, temperature: float = 0.0, static: bool | None = None) -> None:
        """``static``: whether steps work on all slots, as a graph must; if None, on CUDA wherever that is possible."""
        self.model, self.temperature, self.follows = model, temperature, attends_here(model)
        self.ops: StepOps = step_ops(model.device)
        self.static = self.follows and (self._capturable() if static is None else static)
        self.room: Room | None = None

    def _capturable(self) -> bool:
        rotary = getattr(decoder(self.model).config, "rope_parameters", None) or {}
        # one set, or one for each type of layer
        kinds = {part.get("rope_type") for part in (rotary, *rotary.values()) if isinstance(part, dict)}
        return self.model.device.type == "cuda" and not kinds & set(HOST_ROTARY)

    @torch.no_grad()
    def prepare(self, inputs: Mapping[str, Tensor], slots: int) -> None:
        """Makes room, and on CUDA captures the step, for such batches of up to ``slots`` tokens a row."""
        self._make_room(slots, embedded(self.model, inputs))

    @torch.no_grad()
    def tokens(self, inputs: Mapping[str, Tensor], new_tokens: int, slots: int = 0) -> Iterator[Tensor]:
        """``new_tokens`` times the next token [B] of every row, on the host; no token ends it.

        ``inputs`` are a left-padded batch as the model takes it, on its device. Room is made for ``slots`` tokens a
        row if that is more than is needed now: batches of one size within it share a captured step.
        """
        prompts = embedded(self.model, inputs)
        length = prompts.ids.shape[1]
        room = self._make_room(max(slots, length + new_tokens), prompts)
        self._read(prompts, room)
        del prompts  # a picture's embeddings are not needed while the answer goes on
        waiting = _ToHost(room.token)
        for number in range(new_tokens):
            waiting.send(room.token)
            if number + 1 < new_tokens:
                self._next(room)
            yield waiting.receive()

    def _make_room(self, slots: int, prompts: Embedded) -> Room:
        if self.room is None or not self.room.fits(slots, prompts.positions):
            self.room = None  # before there is another
            slots = max(slots, WARM_STEPS + 1)
            cursor = Cursor(len(prompts.ids), self.model.device)
            cache = static_cache(self.model, cursor, slots) if self.follows else None
            self.room = Room(cursor, cache or DynamicCache(config=decoder(self.model).config), slots, prompts.positions)
            if self.static:
                self.room.fused = fused_decoder(self.model, self.ops, self.room.cursor, slots)
                self.room.graph = self._capture(self.room) if self.model.device.type == "cuda" else None
        forget(self.room.cache, self.room.cursor)
        return self.room

    def _capture(self, room: Room) -> torch.cuda.CUDAGraph:
        """A step of this room as a graph; what it leaves in the room is to be forgotten."""
        room.cursor.stepping = True
        stream = _side_stream(self.model.device)
        stream.wait_stream(torch.cuda.current_stream(self.model.device))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            # the model's own code comes first: it makes what the fused operations only use
            self._logits_by_model(room)
            for _ in range(WARM_STEPS):
                self._step(room)
            # other threads call CUDA meanwhile; only this one must do what can be captured
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._step(room)
        torch.cuda.current_stream(self.model.device).wait_stream(stream)
        return graph

    def _read(self, prompts: Embedded, room: Room) -> None:
        """Reads the prompts into the room; leaves the first token after them there."""
        batch, length = prompts.ids.shape
        cursor = room.cursor
        cursor.first.copy_(prompts.first)
        cursor.padded = prompts.keep is not None
        piece = piece_length(self.model, batch, room.slots)
        for begin in range(0, length, piece):
            part = slice(begin, min(begin + piece, length))
            keep = None if prompts.keep is None else prompts.keep[:, part]
            hidden = self._decoded(prompts.part(self.model, part), prompts.positions[..., part], room, keep)
            cursor.seen = part.stop
        self._choose(logits_head(self.model)(hidden[:, -1]), room)
        room.positions.copy_(prompts.positions[..., -1:] + 1)
        cursor.slot.fill_(length)
        cursor.stepping = self.static

    def _next(self, room: Room) -> None:
        """Queues a step."""
        if room.graph is None:
            self._step(room)
        else:
            room.graph.replay()

    def _step(self, room: Room) -> None:
        """The next token of every row, in place; everything that it reads and writes stays where it is."""
        if room.fused is None or not room.cursor.stepping:
            logits = self._logits_by_model(room)
        else:
            embeds = self.model.get_input_embeddings()(room.token)
            logits = room.fused.logits(embeds, room.positions, room.cache)
        self._choose(logits, room)
        torch._foreach_add_([room.positions, room.cursor.slot], 1)  # one kernel
        room.cursor.seen += 1

    def _logits_by_model(self, room: Room) -> Tensor:
        """Logits [B, V] after the last token, by the model's own layers."""
        embeds = self.model.get_input_embeddings()(room.token[:, None])
        hidden = self._decoded(embeds, room.positions, room)
        return logits_head(self.model)(hidden[:, -1])

    def _decoded(self, embeds: Tensor, positions: Tensor, room: Room, keep: Tensor | None = None) -> Tensor:
        """States [B, L, D] of the decoder's last layer; ``keep`` [B, L] is 1 at real tokens."""
        inputs = {"inputs_embeds": embeds, "position_ids": positions, "past_key_values": room.cache, "use_cache": True}
        if not self.follows:
            places = torch.arange(room.cursor.seen + embeds.shape[1], device=embeds.device)
            mask = (places >= room.cursor.first[:, None]).long()
            return decoder(self.model)(**inputs, attention_mask=mask).last_hidden_state
        padding = {} if keep is None else {"padding_mask": keep}
        with engine_attention(self.model):
            made = decoder(self.model)(**inputs, **padding, cursor=room.cursor, step_ops=self.ops)
        return made.last_hidden_state

    def _choose(self, logits: Tensor, room: Room) -> None:
        """Makes tokens of logits [B, V] the room's."""
        if self.temperature == 0:
            return self.ops.argmax(logits, room.token)
        # the largest of the log-probabilities with Gumbel noise is a draw (Gumbel 1954); nothing waits for the host
        noise = torch.empty_like(logits, dtype=torch.float32).exponential_().log_()
        return self.ops.argmax(logits.float() / self.temperature - noise, room.token)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps 32 MB for each stream that it has ever run on."""
    return torch.cuda.Stream(device)


class _ToHost:
    """Tokens on their way to the host, each in pinned memory of its own until it has been received."""

    def __init__(self, token: Tensor) -> None:
        self.cuda = token.device.type == "cuda"
        self.sent: Tensor | None = None
        self.event = torch.cuda.Event() if self.cuda else None

    def send(self, token: Tensor) -> None:
        """Queues the copy behind what makes the token."""
        self.sent = torch.empty(token.shape, dtype=token.dtype, pin_memory=self.cuda)
        self.sent.copy_(token, non_blocking=self.cuda)
        if self.event is not None:
            self.event.record()

    def receive(self) -> Tensor:
        """The token that was sent last, once it is there."""
        assert self.sent is not None
        if self.event is not None:
            self.event.synchronize()
        return self.sent
