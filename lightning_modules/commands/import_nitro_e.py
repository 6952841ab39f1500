"""`emmdit import-nitro-e`: a released Nitro-E file as a diffusers folder."""

from __future__ import annotations

from pathlib import Path

from lightning_modules.commands.options import check_options, command_parser, refuse_used, whole_folder


def import_nitro_e(argv: list[str]) -> None:
    """Convert a released Nitro-E .safetensors file to a diffusers folder."""
    parser = command_parser(import_nitro_e)
    parser.add_argument("file", help="downloaded from the model's page (amd/Nitro-E)")
    parser.add_argument("--out", required=True, help="new folder")
    parser.add_argument("--resolution", type=int, choices=(512, 1024), default=512, help="pixels per side")
    parser.add_argument("--steps", type=int, default=20, help="default sampling steps (4 for the distilled files)")
    parser.add_argument(
        "--guidance", type=float, default=4.5, help="default guidance scale (0 for the distilled files)"
    )
    parser.add_argument("--text_encoder", default="meta-llama/Llama-3.2-1B", help="folder or hub id (gated; see docs)")
    parser.add_argument("--autoencoder", default="mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers", help="folder or hub id")
    args = parser.parse_args(argv)
    check_options(args)
    out = Path(args.out)
    refuse_used(out)
    from lightning_modules.commands.load_model import nitro_e_pipeline  # takes seconds: --help need not wait

    pipeline, _ = nitro_e_pipeline(
        Path(args.file), args.resolution, args.steps, args.guidance, args.text_encoder, args.autoencoder
    )
    with whole_folder(out) as folder:
        pipeline.save_pretrained(folder)
    print(f"{sum(p.numel() for p in pipeline.transformer.parameters()):,} parameters: {out}")
    print("Text encoder and autoencoder are loaded at first use, under their own licenses.")
