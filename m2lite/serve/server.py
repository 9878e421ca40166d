"""What all dialects share: the model, the requests under way and their bounds. Knows no dialect and no HTTP."""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from m2lite.dialogue.chat_request import ChatRequest
from m2lite.dialogue.conversation import turn_stream
from m2lite.dialogue.encode import encode_kept
from m2lite.engine.driver import Driver, News
from m2lite.engine.prefix_cache import page_keys
from m2lite.engine.request import Request
from m2lite.engine.runner import Stop
from m2lite.errors import UsageError
from m2lite.model.cache import PAGE
from m2lite.sampling.draw import Sampling, new_seed
from m2lite.serve.answering import Answering, AnswerRequest, How
from m2lite.serve.errors import Refused
from m2lite.serve.kept import KeptAnswers, KeptPrompts
from m2lite.serve.metrics import Metrics
from m2lite.system.byte_units import format_bytes
from m2lite.system.streams import note
from m2lite.text.template import encode_chat

if TYPE_CHECKING:
    from m2lite.api import Model

T = TypeVar("T")
_MOST_UNSAVED = 256  # answers whose pages wait to be written
_PREFIX_BYTES = 8  # of a hash that names what a prompt begins with


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How a server is run."""

    name: str = ""  # of the model, for clients; by default the file's
    parallel: int = 4  # answers at once
    queue: int = 64  # requests that wait beyond those
    is_strict: bool = False  # another model's name is refused
    api_keys: tuple[str, ...] = ()  # any of which a request must show; none: no key is asked for
    allowed_hosts: tuple[str, ...] = ()  # beside loopback
    allowed_origins: tuple[str, ...] = ()  # of pages in browsers that may ask
    logs_prompts: bool = False
    most_body_bytes: int = 16 << 20
    sampling: Sampling = field(default_factory=Sampling)  # of requests that say nothing, but for its seed
    seed: int | None = None  # of those; by default each has its own
    max_tokens: int | None = None
    think_tokens: int | None = None
    script: Callable[[Sequence[int]], Sequence[int] | None] | None = None  # for tests: what is said to a prompt's ids


class _Unsaved(NamedTuple):
    """What belongs on disk."""

    ids: list[int]
    keys: list[bytes]  # of the answer's ids


class Server:
    """An opened model and the requests that it answers. Belongs to one event loop."""

    def __init__(self, model: Model, options: ServeOptions) -> None:
        self.model, self.options = model, options
        self.name = options.name or model.path.stem
        self.created = int(time.time())  # seconds since 1970
        self.under_way = set[Answering]()
        self.metrics = Metrics()
        self.kept, self._prompts = KeptAnswers(), KeptPrompts()
        self.is_draining = False
        self.n_warming = 0  # prompts that are computed before anybody asks
        self._loop: asyncio.AbstractEventLoop | None = None
        self._driver: Driver | None = None
        # One thread renders and tokenizes: a long prompt there stops neither the event loop nor the compute thread.
        self._texts = ThreadPoolExecutor(1, "m2lite-texts")
        self._n_begun = 0  # requests that are being rendered
        self._unsaved = deque[_Unsaved](maxlen=_MOST_UNSAVED)
        self.keeps_thinking = self._can_keep()

    @property
    def n_open(self) -> int:
        """Requests that are answered or wait."""
        return self._n_begun + len(self.under_way)

    def describe(self) -> list[str]:
        """What whoever starts it should know: the model's name, and how much fits."""
        model, parallel = self.model, self.options.parallel
        n_positions, each = model.runner.pool.n_positions, model.kv_bytes_per_position
        n_long = n_positions // model.ctx
        parts = [
            f"model {self.name}",
            f"{parallel} answers at once",
            f"KV {n_positions:,} tokens ({format_bytes(each)} each): {n_long} as long as the context, "
            f"or {parallel} of {n_positions // parallel:,}",
        ]
        found = [" · ".join(parts)]
        if n_long < parallel and model.kv == "f16":
            found.append(f"{parallel} conversations of {model.ctx:,} do not fit at once: --kv q8_0 holds twice as many")
        if not self.keeps_thinking:
            found.append(
                "warning: the chat template renders a turn by what follows it: each turn computes the last anew"
            )
        return found

    async def start(self) -> None:
        """Inside the event loop that it will serve."""
        self._loop = asyncio.get_running_loop()
        self.model.loop.scheduler.n_most = min(self.options.parallel, self.model.n_rows)
        await asyncio.to_thread(self.model.loop.share_time)
        self.kept.disk = self.model.loop.prefix_cache.disk
        self._driver = Driver(self.model, self._deliver)

    def drain(self) -> None:
        """Take no more requests. Done again, those under way end, and what is not on disk yet is left."""
        if self.is_draining:
            self.end_all()
            if self._driver is not None:
                self._driver.hurry()
        self.is_draining = True

    def end_all(self) -> None:
        """Whoever waits is told that the server ends."""
        for answering in list(self.under_way):
            answering.end(Refused(503, "draining", "The server is ending.", "Ask again soon."))

    async def stop(self) -> None:
        """Cancel what is under way and write what belongs on disk; the model stays open."""
        for answering in list(self.under_way):
            answering.cancel()
        if self._driver is not None:
            await asyncio.to_thread(self._driver.close)
        self._texts.shutdown(wait=False, cancel_futures=True)

    async def off_loop(self, call: Callable[[], T]) -> T:
        """Run what takes a while, such as to parse, render and tokenize, off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._texts, call)

    def defaults(self) -> ChatRequest:
        """A request that says nothing."""
        options = self.options
        sampling = replace(options.sampling, seed=new_seed() if options.seed is None else options.seed)
        return ChatRequest([], sampling, max_tokens=options.max_tokens, think_tokens=options.think_tokens)

    async def begin(self, asked: AnswerRequest) -> Answering:
        """Ask the model. Refused where too many wait; UsageError or ContextError for what can never be answered."""
        self.check_model(asked.chat.model)
        if self.is_draining:
            raise Refused(503, "draining", "The server is ending.", "Ask again soon.", headers={"Retry-After": "5"})
        n_most = self.options.parallel + self.options.queue
        if self.n_open >= n_most:
            seconds = str(max(1, min(60, round(self.metrics.first_token.mean))))
            raise Refused(
                429, "queue_full", f"{n_most} requests are under way or wait, which is the limit.",
                f"Ask again in {seconds} s.", headers={"Retry-After": seconds},
            )  # fmt: skip
        self._n_begun += 1
        try:
            prompt = asked.prompt
            if prompt is None:
                prompt = await self.off_loop(lambda: self.encode(asked.chat))
            answering = Answering(asked, prompt, self.model.tokenizer, self.metrics, self._conclude)
            try:
                await self.off_loop(lambda: self._submit(answering))
            except BaseException:  # its client has gone, say, while it was asked
                answering.give_up()
                raise
        finally:
            self._n_begun -= 1
        self.under_way.add(answering)
        return answering

    def encode(self, chat: ChatRequest) -> list[int]:
        """The ids of a request's messages. Answers among them are what they were, as far as that is known."""
        model = self.model
        if not self.keeps_thinking:
            return encode_chat(model.tokenizer, model.template, chat.messages, chat.tools)
        recall, prompts = self.kept.recall(), self._prompts
        keys = prompts.keys(chat.messages, chat.tools)
        ids = encode_kept(
            model.tokenizer, model.template, chat.messages, chat.tools, True, recall, lambda n: prompts.get(keys[n])
        )
        prompts.keep(keys[-1], ids)
        self.metrics.n_recalled += recall.n_known
        self.metrics.n_rendered += recall.n_unknown
        return ids

    def _can_keep(self) -> bool:
        """Whether the template renders a turn whatever follows it, so that earlier ones can stay as they were."""
        calls = [{"type": "function", "function": {"name": "x", "arguments": {"y": "z"}}}]
        probe: list[dict[str, Any]] = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "x", "reasoning_content": "x", "tool_calls": calls},
            {"role": "tool", "content": "x"},
            {"role": "assistant", "content": "x", "reasoning_content": ""},
            {"role": "user", "content": "x"},
        ]
        try:
            encode_kept(self.model.tokenizer, self.model.template, probe, None, True, self.kept.recall())
        except UsageError:
            return False
        return True

    def _submit(self, answering: Answering) -> None:
        assert self._driver is not None
        answering.begin(self._driver.submit(self._request(answering), answering))
        if answering.log is not None:  # only now are its ids known to be ones
            answering.log.prefix = answering.log.prefix or self._prefix(answering)

    def _prefix(self, answering: Answering) -> str:
        """A name for what the prompt begins with: tools and messages up to the first answer, which all turns of a
        conversation have in common. Of ids, their first page; "" if they have none."""
        chat = answering.asked.chat
        if answering.asked.prompt is not None:
            key = next(iter(page_keys(answering.prompt[:PAGE])), b"")
        else:
            asked = list(takewhile(lambda message: message["role"] != "assistant", chat.messages))
            key = self._prompts.keys(asked, chat.tools)[-1]
        return key[:_PREFIX_BYTES].hex()

    def _request(self, answering: Answering) -> Request:
        asked = answering.asked
        stream = asked.rng_stream
        if stream is None:
            stream = turn_stream(asked.chat.messages) if asked.prompt is None else 0
        request = asked.chat.to_engine(answering.prompt, stream, answering.id)
        if asked.has_experts:
            request = replace(request, experts=True)
        if asked.prompt_logprobs is not None:  # nobody's next prompt begins with it
            request = replace(request, prompt_logprobs=asked.prompt_logprobs, keep="nothing")
        script = self.options.script
        return request if script is None else replace(request, script=script(answering.prompt))

    def check_model(self, name: str | None, is_strict: bool = False) -> None:
        """Refused for another model's name, where that counts."""
        if (is_strict or self.options.is_strict) and name not in (None, self.name):
            raise Refused(404, "model_not_found", f"There is no model {name!r} here.", f"Ask for {self.name!r}.")

    def _conclude(self, answering: Answering, how: How) -> None:
        """The answer has ended: it is counted and told, and what it was is kept."""
        self.under_way.discard(answering)
        completion, stats = answering.handle.completion, answering.handle.completion.stats
        self.metrics.ended(completion, how)
        if answering.log is not None:
            n_drafted = 0 if stats.drafted is None else stats.drafted.n_accepted
            drafted = f" ({n_drafted} drafted)" if n_drafted else ""
            answering.log.notes += [
                f"{stats.n_prompt:,} tokens ({stats.n_reused:,} cached)",
                f"{len(completion.tokens):,} said{drafted}",
                how,
            ]
        if self.options.logs_prompts:
            note(f"{answering.id} {json.dumps(self.model.tokenizer.decode(completion.tokens), ensure_ascii=False)}")
        if completion.finish_reason == "interrupted":
            return
        keys = list[bytes]()
        if answering.asked.prompt is None and self.keeps_thinking and not answering.handle.answer.is_cut:
            keys = self.kept.keep(answering.prompt, answering.message(), completion.tokens)
        if self.kept.disk is not None and self._driver is not None:
            self._unsaved.append(_Unsaved([*answering.prompt, *completion.tokens], keys))
            self._driver.later(self._save)

    def _save(self, stop: Stop) -> None:
        """On the driver's thread, while nobody waits: pages and ids of answers go to the disk."""
        try:
            self._save_all(stop)
        except Exception as error:  # it must not end the thread that answers everybody
            self._unsaved.clear()
            note(f"warning: prompts and answers are not kept on disk: {error}")

    def _save_all(self, stop: Stop) -> None:
        while self._unsaved:
            ids, keys = unsaved = self._unsaved.popleft()
            self.model.loop.save(ids, stop)
            if stop():
                self._unsaved.appendleft(unsaved)
                assert self._driver is not None
                self._driver.later(self._save)
                return
            self.kept.save(keys)

    def _deliver(self, news: list[News]) -> None:
        """On another thread: one call into the event loop for a whole burst."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(_hand_out, news)
        except RuntimeError:  # the event loop has ended: nobody waits
            return


def _hand_out(news: list[News]) -> None:
    for each in news:
        each.listener.hear(each)
