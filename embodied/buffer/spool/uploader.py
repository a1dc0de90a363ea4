"""The robot host's end: sends a spool's steps until they are durable at the learner's site."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import msgspec

from embodied.buffer.serve.messages import (
    MAX_BATCH_BYTES,
    MAX_BATCH_STEPS,
    MAX_RESUME_EPISODES,
    AppendReply,
    ResumeReply,
    ResumeRequest,
)
from embodied.buffer.spool.bucket import Budget, Unlimited
from embodied.buffer.spool.index import SpooledEpisode, SpoolIndex
from embodied.buffer.spool.messages import wrap
from embodied.buffer.spool.order import Kind, SendingOrder
from embodied.comms.channels import ErrorReply, Requests
from embodied.core.errors import ConfigError, CorruptDataError

_WINDOW = 4
_MOST_RECORDS = 2048
_MOST_REFUSALS = 3
_RETRY_S = 0.1
_MOST_BACKOFF = 4
# Refusals that are about the steps themselves and come again; any other passes, and is waited for.
_LASTING = ("SpecError", "CorruptDataError", "StepOrderError", "ForeignStreamError")
_NAMED = 16


class SpoolStatus(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a spool still has to send, and what was done since the uploader began.

    depth: not acknowledged. oldest_unsent_s: since the uploader first saw the oldest step that was
    not sent. sent: all together, resent ones among them; sent_bytes: payloads as they were sent.
    duplicate: sent and already there. set_aside: stream, episode and why, of the first that cannot
    be sent; they are kept. error: the latest refusal or silence; None once something was
    acknowledged again.
    """

    depth_steps: int
    depth_bytes: int
    oldest_unsent_s: float
    in_flight_batches: int
    sent_steps: int
    sent_bytes: int
    sent_batches: int
    resent_steps: int
    acknowledged_steps: int
    duplicate_steps: int
    num_set_aside: int
    set_aside: tuple[tuple[str, int, str], ...]
    error: str | None


@dataclass(slots=True, eq=False)
class _Batch:
    kind: Kind
    request: int
    parts: list[tuple[SpooledEpisode, int, int]]


@dataclass(slots=True)
class _Filling:
    """A batch that is being put together."""

    schema: int = -1
    payloads: list[memoryview] = field(default_factory=list)
    nbytes: int = 0
    parts: list[tuple[SpooledEpisode, int, int]] = field(default_factory=list)


class Uploader:
    """Follows the spool of this host and sends what is durable there, a few batches in flight.

    requests: to a Receiver, with UPLOAD_REPLIES; it delivers in order or not at all. budget: bytes
    per second. batch_bytes: of one request, unless a single step is larger. fresh_share: see
    SendingOrder. resend_s: silence after which the other side is asked how far it is, unless the
    link has told before that what was sent is lost; doubled while nothing comes. For one thread; it
    works while pump is called. Raises RunInUseError while another uploader sends this spool.
    """

    def __init__(
        self,
        path: Path,
        requests: Requests,
        host: str,
        *,
        budget: Budget | None = None,
        batch_bytes: int = 1 << 18,
        fresh_share: float = 0.75,
        resend_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0 < batch_bytes <= MAX_BATCH_BYTES or resend_s <= 0:
            raise ConfigError(
                f"batch_bytes is {batch_bytes} and resend_s {resend_s}; they must lie in "
                f"1..{MAX_BATCH_BYTES} and be positive"
            )
        self._requests = requests
        self._budget = budget or Unlimited()
        self._batch_bytes = batch_bytes
        self._resend_s = resend_s
        self._clock = clock
        self._order = SendingOrder(fresh_share)
        self._index = SpoolIndex(path, host, self._order.note, self._order.forget, clock)
        self._caught_up = False
        self._flying: deque[_Batch] = deque()
        self._asking: tuple[int, list[SpooledEpisode]] | None = None
        self._heard_s = clock()
        self._hold_until_s = self._heard_s
        self._backoff = 1
        self._error: str | None = None
        self._sent_steps = self._sent_bytes = self._sent_batches = 0
        self._resent = self._acknowledged = self._duplicates = 0

    def pump(self) -> bool:
        """Take answers in, note new steps, send what may be sent; never waits for the link.

        Returns whether there is more to do at once. Raises StorageFullError or OSError if the
        spool's disk fails; what was not acknowledged is still there.
        """
        for reply in self._requests.receive_ready():
            self._take_reply(reply.id, reply.header)
        more = self._index.refresh(_MOST_RECORDS)
        # Before it has seen all there is, it cannot tell running episodes from old ones.
        self._caught_up |= not more
        now_s = self._clock()
        self._check_silence(now_s)
        sent = False
        if self._caught_up and now_s >= self._hold_until_s:
            self._ask(now_s)
            sent = self._send(now_s)
        self._index.store()
        return more or sent

    def _take_reply(self, number: int, header: Any) -> None:
        if self._asking is not None and self._asking[0] == number:
            episodes, self._asking = self._asking[1], None
            if isinstance(header, ResumeReply) and (
                len(header.next_index) == len(header.next_episode) == len(episodes)
            ):
                self._heard()
                for values in zip(episodes, header.next_index, header.next_episode, strict=True):
                    self._resume(*values)
            else:
                self._refused(header, [])
            return
        batch = next((batch for batch in self._flying if batch.request == number), None)
        if batch is None:
            return
        if not isinstance(header, AppendReply):
            self._refused(header, [episode for episode, _, _ in batch.parts])
            return
        self._heard()
        self._flying.remove(batch)
        self._duplicates += header.num_duplicate
        for episode, _, stop in batch.parts:
            if stop > episode.acknowledged:
                self._acknowledged += stop - episode.acknowledged
                episode.alone, episode.refusals = False, 0
                self._index.acknowledge(episode, stop)

    def _heard(self) -> None:
        self._heard_s, self._backoff, self._error = self._clock(), 1, None

    def _resume(self, episode: SpooledEpisode, index: int | None, next_episode: int) -> None:
        """Go on where the other side says. index: None if it deleted the episode."""
        mine = self._index.next_episode[episode.stream]
        if next_episode > mine:
            self._put_aside(
                episode,
                f"the learner's site has episodes of stream '{episode.stream}' up to "
                f"{next_episode - 1}, this spool up to {mine - 1}: it is not the spool that sent "
                "them (was it emptied?). Record under another stream name",
            )
            return
        index = episode.end if index is None else index
        if not episode.first <= index <= episode.end:
            self._put_aside(
                episode,
                f"the learner's site has it up to index {index}; this spool has {episode.first} "
                f"to {episode.end - 1}",
            )
            return
        episode.known = True
        self._acknowledged += max(0, min(index, episode.most_sent) - episode.acknowledged)
        episode.sent = index
        self._index.acknowledge(episode, index)
        episode.most_sent = max(episode.most_sent, index)
        if episode.key in self._index.episodes:
            self._order.note(episode)

    def _put_aside(self, episode: SpooledEpisode, why: str) -> None:
        episode.set_aside = why
        self._order.forget(episode)

    def _refused(self, header: Any, episodes: list[SpooledEpisode]) -> None:
        """Begin again where the other side is; steps that are refused time and again stay here."""
        lasting = False
        if isinstance(header, ErrorReply):
            self._error = f"{header.kind}: {header.message}"
            lasting = header.kind in _LASTING
        else:
            self._error = f"the other side answered with {type(header).__name__}"
        for episode in episodes if lasting else ():
            episode.refusals += 1
            episode.alone = True
            if episode.refusals >= _MOST_REFUSALS:
                self._put_aside(episode, self._error)
        self._rewind()
        if not lasting or not episodes:
            self._hold_until_s = self._clock() + self._resend_s / 4

    def _rewind(self) -> None:
        """Give up everything in flight; its episodes are asked about before they go on."""
        for batch in self._flying:
            self._requests.forget(batch.request)
            for episode, _, _ in batch.parts:
                episode.known, episode.sent = False, episode.acknowledged
                if episode.set_aside is None and episode.key in self._index.episodes:
                    self._order.note(episode)
        self._flying.clear()
        if self._asking is not None:
            self._requests.forget(self._asking[0])
            self._asking = None

    def _check_silence(self, now_s: float) -> None:
        waits = self._flying or self._asking is not None
        if waits and self._lost():
            self._error = "the link broke"
            self._rewind()
        elif waits and now_s - self._heard_s > self._resend_s * self._backoff:
            self._error = f"no answer for {now_s - self._heard_s:.0f} s"
            self._backoff = min(2 * self._backoff, _MOST_BACKOFF)
            self._heard_s = now_s
            self._rewind()

    def _lost(self) -> bool:
        """Whether the link knows that something in flight will not be answered."""
        numbers = [batch.request for batch in self._flying]
        if self._asking is not None:
            numbers.append(self._asking[0])
        return any(self._requests.lost(number) for number in numbers)

    def _ask(self, now_s: float) -> None:
        if self._asking is not None:
            return
        episodes = self._order.unknown(MAX_RESUME_EPISODES)
        if not episodes:
            return
        request = ResumeRequest(tuple(episode.key for episode in episodes))
        number = self._requests.send(request, {})
        if number is None:
            self._hold_until_s = now_s + _RETRY_S
            return
        self._note_sent(now_s)
        self._asking = number, episodes

    def _note_sent(self, now_s: float) -> None:
        if not self._flying and self._asking is None:  # silence is counted from here
            self._heard_s = now_s

    def _send(self, now_s: float) -> bool:
        """Send what window, budget and order allow; whether anything was sent."""
        sent = False
        while len(self._flying) < _WINDOW and self._budget.ready():
            behind = sum(batch.kind is Kind.BACKLOG for batch in self._flying)
            kind = self._order.next_kind(backlog=behind < _WINDOW - 1)
            if kind is None:
                break
            filling = self._fill(kind)
            if not filling.parts:
                continue
            request, arrays = wrap(self._index.schema(filling.schema), filling.payloads)
            number = self._requests.send(request, arrays)
            if number is None:
                for episode, start, _ in filling.parts:
                    episode.sent = start
                    self._order.note(episode)
                self._hold_until_s = now_s + _RETRY_S
                break
            self._note_sent(now_s)
            self._flying.append(_Batch(kind, number, filling.parts))
            self._count(kind, filling, arrays["payloads"].nbytes)
            sent = True
        return sent

    def _fill(self, kind: Kind) -> _Filling:
        """Put a batch together: steps of one schema, of one episode after the other."""
        filling = _Filling()
        for episode in self._order.candidates(kind):
            if filling.parts and (episode.alone or filling.parts[0][0].alone):
                break
            start = index = episode.sent
            while index < episode.end and len(filling.payloads) < MAX_BATCH_STEPS:
                try:
                    schema, payload = self._index.read(episode, index)
                except CorruptDataError as error:
                    self._put_aside(episode, str(error))
                    break
                full = filling.nbytes + payload.nbytes > self._batch_bytes
                if filling.payloads and (full or schema != filling.schema):
                    break
                filling.schema = schema
                filling.payloads.append(payload)
                filling.nbytes += payload.nbytes
                index += 1
            if index > start:
                episode.sent = index
                filling.parts.append((episode, start, index))
            if index < episode.end:
                break
        return filling

    def _count(self, kind: Kind, filling: _Filling, nbytes: int) -> None:
        for episode, start, stop in filling.parts:
            episode.begun |= kind is Kind.FRESH
            self._sent_steps += stop - start
            self._resent += max(0, min(stop, episode.most_sent) - start)
            episode.most_sent = max(episode.most_sent, stop)
        self._sent_bytes += nbytes
        self._sent_batches += 1
        self._budget.spend(nbytes)
        self._order.spend(kind, nbytes)

    def status(self) -> SpoolStatus:
        """What there is to send, and what was done."""
        now_s = self._clock()
        episodes = self._index.episodes.values()
        unsent = [e.seen_s[e.sent - e.first] for e in episodes if e.sent < e.end]
        aside = [(*e.key, e.set_aside) for e in episodes if e.set_aside is not None]
        return SpoolStatus(
            self._index.depth_steps,
            self._index.depth_bytes,
            now_s - min(unsent, default=now_s),
            len(self._flying),
            self._sent_steps,
            self._sent_bytes,
            self._sent_batches,
            self._resent,
            self._acknowledged,
            self._duplicates,
            len(aside),
            tuple(aside[:_NAMED]),
            self._error,
        )

    def close(self) -> None:
        """Close the spool's files; `requests` stays open. What is in flight is sent again by the
        next uploader unless it arrives. Safe to call twice."""
        self._index.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
