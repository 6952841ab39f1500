"""`emmdit export`: a checkpoint as a diffusers folder with a model card."""

from __future__ import annotations

from pathlib import Path

from lightning_modules.commands.options import (
    DTYPES,
    add_trust_argument,
    command_parser,
    refuse_used,
    whole_folder,
)


def export(argv: list[str]) -> None:
    """Write a checkpoint's weights as a diffusers folder that TextToImagePipeline.from_pretrained loads."""
    parser = command_parser(export)
    parser.add_argument("--ckpt", required=True, help="run folder or checkpoint")
    parser.add_argument("--out", required=True, help="new folder")
    parser.add_argument("--weights", choices=("ema", "raw"), help="which weights; EMA if available")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="type in which the weights are stored")
    parser.add_argument(
        "--include_encoders",
        action="store_true",
        help="copy pretrained text encoder and autoencoder into the folder (their licenses apply to it); otherwise "
        "they are named and loaded from where training found them",
    )
    add_trust_argument(parser)
    args = parser.parse_args(argv)
    out = Path(args.out)
    refuse_used(out)
    from emmdit.weights import is_diffusers_folder  # these take seconds: --help and errors need not wait
    from lightning_modules.commands import load_model
    from lightning_modules.commands.model_card import write_card

    if is_diffusers_folder(args.ckpt):
        raise ValueError(f"{args.ckpt} is a diffusers folder already: --ckpt names a run folder or a checkpoint.")
    pipeline, note = load_model.load_pipeline(args.ckpt, args.weights, args.include_encoders, args.trust_code)
    pipeline.transformer.to(load_model.DTYPES[args.dtype])
    with whole_folder(out) as folder:
        pipeline.save_pretrained(folder)
        write_card(folder, out.resolve().name, args.ckpt, pipeline, note, args.dtype)
    parameters = sum(p.numel() for p in pipeline.transformer.parameters())
    print(f"{note['weights']} weights, {parameters:,} parameters, {args.dtype}: {out}")
