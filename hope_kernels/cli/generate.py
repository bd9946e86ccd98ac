"""``generate``: reads a prompt as a stream, writes on; stopped at any token, the same command goes on."""

from __future__ import annotations

import contextlib
import sys
import time

from ..engine.generation import read
from .lock import held
from .meter import megabytes, resident_bytes
from .models import check_run, load_model, load_session, unread_ids, usable_device
from .parser import DTYPES
from .progress import Progress, bits, guarded
from .prompt import encoded, opened, prompt_for, prompt_name
from .session import Interrupt, SessionFile, resume, session_path, stopped_code
from .terminal import Output, notice
from .writing import writer_for


def generate_command(args) -> int:
    check_run(args)
    if args.max_new_tokens < 0:
        raise ValueError(f"argument --max-new-tokens is {args.max_new_tokens}, expected 0 or more")
    output = Output(sys.stdout) if args.max_new_tokens else None
    if args.session is None:
        return run(args, None, output)
    path = session_path(args.session)
    with held(path, args.session):
        return run(args, path, output)


def run(args, path: str | None, output: Output | None) -> int:
    """Reads and writes; the session at ``path`` is this process's."""
    device = usable_device(args.device)
    model, tokenizer = load_model(args.model, device, DTYPES.get(args.dtype))
    state, note = load_session(model, path, args.session, device)
    unread, ends = unread_ids(state), () if args.ignore_eos else tokenizer.eos_ids
    lead = unread or ([] if state.pos[0] else list(tokenizer.start_ids))
    stops = [*args.stop, *tokenizer.stop]
    with opened(args.prompt_file) as file, Interrupt() if path else contextlib.nullcontext() as interrupt:
        name = prompt_name(args.prompt_file, args.prompt)
        prompt = prompt_for(tokenizer, name, file, encoded(args.prompt), lead, device)
        going = None if args.no_resume else resume(note, prompt, args.session)
        going = going or {"phase": "reading", "written": 0}
        earlier = going["written"]
        if going["phase"] == "writing" and earlier >= args.max_new_tokens:
            raise ValueError(f"session {args.session} stopped after writing {earlier} tokens, of "
                             f"--max-new-tokens {args.max_new_tokens}; ask for more to go on, or pass "
                             "--no-resume to read the prompt once more")
        writer = None
        if output is not None:
            writer = writer_for(output, tokenizer, stops, ends, going, lambda: prompt.recent)
        session = SessionFile(path, args.save_every)
        progress = Progress(prompt.expected, prompt.count, tokenizer.unit, args.quiet)
        at = written = 0
        nats = 0.0
        failed: OSError | None = None

        def noted(phase: str, unsent: bool = False) -> dict:
            kept = writer.note() if writer and phase == "writing" else {}
            return {"phase": phase, "prompt": prompt.name, prompt.unit: prompt.count, "sha256": prompt.sha256,
                    "written": earlier + written, **kept, **({"unsent": True} if unsent else {})}

        def on_piece(now: int, loss: float) -> None:
            nonlocal at, nats
            at, nats = now, loss
            prompt.confirm(at)
            progress.read(at, prompt.expected)
            if prompt.more:
                session.save_if_due(state, lambda: noted("reading"))

        def on_token(tokens: list) -> None:
            nonlocal written, failed
            progress.close()
            assert writer is not None
            try:
                writer.write(tokens[0])
            except OSError as error:
                failed = error
                return
            written += 1
            session.save_if_due(state, lambda: noted("writing"))

        def ended() -> bool:
            return writer is not None and writer.ended

        def stopping() -> bool:
            return failed is not None or ended() or bool(interrupt and interrupt())

        began, unsent, finished = time.perf_counter(), False, False
        try:
            if not args.max_new_tokens:
                finished = read(
                    model, prompt, state, learn=args.learn, backend=args.backend, on_piece=on_piece,
                    should_stop=stopping, unread="included", guard=not args.no_guard,
                ).finished
                if finished and not at:
                    raise ValueError("empty prompt: there is nothing to read and nothing to write")
            else:
                if going.get("unsent") and unread:
                    on_token(unread)
                finished = ended() or earlier + written == args.max_new_tokens
                if not (finished or stopping()):
                    # the byte model's stops are also the engine's; a tokenizer's text has its own boundaries
                    finished = model.generate(
                        None if going["phase"] == "writing" else prompt,
                        args.max_new_tokens - earlier - written, state, learn=args.learn,
                        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed,
                        stop=[encoded(s) for s in stops] if tokenizer.reads_bytes else (), eos_token_id=ends,
                        on_token=on_token, on_piece=on_piece, backend=args.backend, should_stop=stopping,
                        unread="included", guard=not args.no_guard,
                    ).finished or ended()
            unsent = failed is not None
            finished = finished and not unsent
        except OSError as error:  # of the prompt: all other errors of files are handled where they occur
            failed = error
        finally:
            progress.close()
        seconds = time.perf_counter() - began
        if writer is not None and not unsent:
            try:
                writer.close("\n" if finished else "")
            except OSError as error:
                failed = error if finished else failed
        if path is not None and (finished or at or written):
            phase = "writing" if written or unsent else "reading"
            session.save(state, None if finished else noted(phase, unsent))
    if failed is not None or not finished:
        where = "standard output" if unsent or finished else prompt.name
        reason = f"{where}: {failed.strerror or failed}; " if failed else ""
        untouched = "" if finished or at or written else " as it was"
        kept = f"; session in {args.session}{untouched}" if path else ""
        again = ", the same command goes on from there" if path and not finished else ""
        notice(f"hope_kernels: {reason}stopped after reading {prompt.count} {prompt.unit} of {prompt.name} "
               f"and writing {earlier + written}{kept}{again}")
        return stopped_code(failed, interrupt)
    if not args.quiet:
        speed = (at + written) / seconds
        loss = f", {bits(nats, at - 1):.3f} bits per {prompt.unit[:-1]} read" if at > 1 else ""
        notice(f"read {at} and wrote {written} {prompt.unit} in {seconds:.1f} s ({speed:.0f}/s), "
               f"learn={args.learn}{loss}, memory {megabytes(resident_bytes())}{guarded(state)}"
               + (f", session in {args.session}" if path else ""))
    return 0
