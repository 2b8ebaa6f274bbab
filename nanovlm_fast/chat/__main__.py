"""Opens a local web page to ask a model about pictures.

python -m nanovlm_fast.chat --checkpoint RUN
"""

from __future__ import annotations

import os
import sys
import webbrowser

from nanovlm_fast.chat.answer import Answerer, limits_of
from nanovlm_fast.chat.server import UPLOAD, Server
from nanovlm_fast.command import Parser, add_model_options, reports_errors
from nanovlm_fast.device import device_name, leave_busy_cores, make_current, pick_device
from nanovlm_fast.ranges import Range
from nanovlm_fast.weights.folder import resolve
from nanovlm_fast.weights.pretrained import load_pretrained


def make_parser() -> Parser:
    """Return the parser of `python -m nanovlm_fast.chat`."""
    parser = Parser(
        prog="python -m nanovlm_fast.chat",
        description="Open a local web page to ask a model about pictures.",
    )
    add_model_options(parser)
    parser.add_argument(
        "--port",
        type=Range(int, most=65535),
        default=7860,
        help="of the page's address on this machine; 0: any that is free",
    )
    parser.add_argument(
        "--max-new-tokens", type=Range(int, least=1), default=100, help="longest reply, in tokens"
    )
    parser.add_argument(
        "--no-browser", action="store_true", help="only print the address, open no browser"
    )
    return parser


def start(argv: list[str] | None = None) -> tuple[Server, bool]:
    """Load the model and take the port. Returns the server, and whether to open a browser."""
    args = make_parser().parse_args(argv)
    device = make_current(pick_device(args.device))
    leave_busy_cores(device)
    folder = resolve(args.checkpoint)
    model, tokenizer = load_pretrained(folder, device, args.lm_tokenizer)
    limits = limits_of(folder, model.config)
    answerer = Answerer(model, tokenizer, device, args.max_new_tokens, limits)
    count = sum(parameter.numel() for parameter in model.parameters())
    facts = {
        "checkpoint": str(folder),
        "device": device_name(device),
        "parameters": count,
        "max_images": answerer.max_images,
        "converses": answerer.converses,
        "upload": UPLOAD,
    }
    return Server(answerer, facts, args.port), not args.no_browser


def has_a_screen() -> bool:
    """Whether a browser with a window can open: in a terminal alone, a text browser would."""
    return sys.platform == "darwin" or bool({"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys())


@reports_errors()
def main(argv: list[str] | None = None) -> int:
    """Serve the page until Ctrl-C."""
    server, opens = start(argv)
    with server:
        print(f"{server.facts['checkpoint']} answers at {server.url} (Ctrl-C ends it)", flush=True)
        if opens and has_a_screen():
            webbrowser.open(server.url)
        server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
