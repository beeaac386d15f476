"""``kdpo ui``: a page in the browser to try edits on, built with gradio."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import KDPOError
from .loading import load_model, stored_dtype, writable_ledger
from .options import Changes, Device, DtypeOption, HParams, Model, Recipe, RecipeOption, Trust
from .settings import chosen_settings
from .terminal import say

if TYPE_CHECKING:
    from ..compare.run.datasets import Record
    from .trying import Trial

NEEDED = "kdpo ui needs gradio: pip install 'kdpo-editor[ui]'"
EXAMPLES = 4
CSS = """
#answers table { width: 100%; border-collapse: collapse; margin: 0; }
#answers :is(table, thead, tbody, tr, th, td) { border: 0; }
#answers :is(th, td) { text-align: left; vertical-align: top; padding: .5rem .6rem .5rem 0; overflow-wrap: anywhere;
  border-bottom: 1px solid var(--border-color-primary); }
#answers tbody th { font-weight: 400; white-space: nowrap; color: var(--block-label-text-color); }
#answers td { width: 29%; }
#answers b { display: block; font-size: .85em; font-weight: 600; }
.good { color: #17713a; }
.bad, .error { color: #a3360b; }
.dark .good { color: #6fdc98; }
.dark :is(.bad, .error) { color: #ffa583; }
@media (max-width: 40rem) {
  #answers thead { display: none; }
  #answers :is(table, tbody, tr, th, td) { display: block; width: auto; padding: .1rem 0; border: 0; }
  #answers tr { border-bottom: 1px solid var(--border-color-primary); padding: .6rem 0; }
  #answers td::before { content: attr(data-head) ": "; color: var(--block-label-text-color); }
  #answers td[data-head=prompt]::before { content: none; }
  #answers b { display: inline; margin-left: .4rem; }
}
"""


def ui(
    model: Model,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The ledger (default: one that goes with the page).")
    ] = None,
    hparams: HParams = None,
    recipe: RecipeOption = Recipe.KDPO,
    changes: Changes = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompts into the model's own chat template.")] = False,
    longest: Annotated[int, typer.Option(metavar="T", min=1, help="Tokens to generate.")] = 12,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where the page is served.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=1, max=65535, help="Its port.")] = 7860,
    dtype: DtypeOption = None,
    device: Device = None,
    trust_remote_code: Trust = False,
) -> int:
    """Open a page to edit on: answers before and after side by side, undo, the adapter to download."""
    try:
        import gradio  # noqa: F401  # before a model is loaded
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(NEEDED, name=error.name) from None
    from ..compare.run.datasets import load
    from ..derived import complete
    from ..testbed import SHIPPED_MODEL
    from .trying import Trial

    settings, _ = chosen_settings(model, hparams, recipe.value, changes or ())
    records = load("shipped" if model == SHIPPED_MODEL else "counterfact")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="kdpo-")))
        ledger = stack.enter_context(writable_ledger(out or folder / "edits", 0.0, False, made=True))
        wanted = dtype.value if dtype else stored_dtype(ledger) or ("float16" if settings.fp16 else "float32")
        loaded, tok = load_model(model, wanted, settings.device if device is None else device, trust_remote_code)
        ledger.restore(loaded)
        trial = Trial(loaded, tok, ledger, complete(settings, loaded), longest, chat)
        page = layout(trial, records, f"{model}, {recipe.value}", folder)
        try:
            _, address, _ = page.launch(server_name=host, server_port=port, prevent_thread_lock=True, quiet=True,
                                        share=False, css=CSS, footer_links=[])  # fmt: skip
        except OSError as error:
            raise OSError(f"the page cannot be served at {host}, port {port}; try another --port ({error})") from None
        stack.callback(page.close)
        say(f"The page is at {address} (Ctrl-C ends it).")
        with suppress(KeyboardInterrupt):
            threading.Event().wait()
    return 0


def layout(trial: Trial, records: Sequence[Record], title: str, folder: Path) -> Any:
    """The page, as gradio's ``Blocks``.

    Args:
        trial: what its buttons act on; one at a time, whoever presses them.
        records: facts to begin with, and to offer rephrasings and other subjects from.
        title: of the page.
        folder: where adapters are written to be downloaded.
    """
    import gradio as gr

    from .trying import error_text, offer

    def pressed(action: Callable[..., str]) -> Callable[..., Any]:
        def run(*fields: str) -> Any:
            said, table = trial.press(action, *fields)
            return (said, gr.skip(), gr.skip()) if table is None else (said, table, gr.File(None, visible=False))

        return run

    def pack() -> Any:
        try:
            return "<p>The adapter is ready.</p>", gr.File(str(trial.adapter(folder)), visible=True)
        except (KDPOError, ModuleNotFoundError) as error:
            return error_text(error), gr.skip()

    def suggest(prompt: str, subject: str) -> Any:
        found = offer(prompt, subject, records)
        said = "Suggested from facts like this one." if any(found) else "No fact that comes along is like this one."
        return f"<p>{said}</p>", *(text or gr.skip() for text in found)

    shown = [r for r in records if r.subject_in_prompt][:EXAMPLES]
    examples = [[r.prompt, r.subject, r.target_new, *offer(r.prompt, r.subject, records)] for r in shown]
    first = dict(zip(("prompt", "subject", "target", "rephrasings", "subjects"), examples[0], strict=True))
    with gr.Blocks(title=f"kdpo: {title}", analytics_enabled=False) as page:
        gr.Markdown(f"# Edit a fact\n{title}")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                fields = [
                    gr.Textbox(first["prompt"], label="Prompt", elem_id="prompt"),
                    gr.Textbox(first["subject"], label="Subject, word for word", elem_id="subject"),
                    gr.Textbox(first["target"], label="New answer", elem_id="target"),
                    gr.Textbox(first["rephrasings"], label="Rephrasings, one a line", lines=3, elem_id="rephrasings"),
                    gr.Textbox(first["subjects"], label="Other subjects, one a line", lines=3, elem_id="subjects"),
                ]
                offered = gr.Button("Suggest rephrasings and subjects", size="sm", elem_id="offer")
                labels = [f"{r.subject} → {r.target_new}" for r in shown]
                gr.Examples(examples, fields, example_labels=labels)
            with gr.Column(scale=3, min_width=320):
                with gr.Row():
                    ask = gr.Button("Ask", min_width=60, elem_id="ask")
                    edit = gr.Button("Edit", variant="primary", min_width=60, elem_id="edit")
                    undo = gr.Button("Undo", min_width=60, elem_id="undo")
                said = gr.HTML(elem_id="said")
                table = gr.HTML(elem_id="answers")
                adapter = gr.Button("Make the adapter (LoRA)", size="sm", elem_id="adapter")
                file = gr.File(label="Adapter", interactive=False, visible=False, elem_id="file")
        model: Any = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
        for button, action in ((ask, trial.ask), (edit, trial.edit), (undo, trial.undo)):
            button.click(pressed(action), fields, [said, table, file], **model)
        adapter.click(pack, None, [said, file], **model)
        offered.click(suggest, fields[:2], [said, *fields[3:]], api_visibility="private")
    return page
