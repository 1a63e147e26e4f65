"""How published models are sampled by their authors, under one name each: what `--preset` sets.

A value that a flag gives goes before a preset's, and a preset's before the model's own. Sources: Wan2.1 and
Wan2.2, wan/configs and generate.py; Pusa-VidGen at 8a8c4f5, the scripts of examples/pusavideo and its README
(strength of its LoRA 1.3 to 1.5, kept images at 0.2); Wan2.2-Lightning, four steps without guidance.
"""

NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""Wan's negative prompt, of all its models (wan/configs/shared_config.py)."""

I2V_NEGATIVE, FLF2V_NEGATIVE = f"镜头晃动，{NEGATIVE}", f"镜头切换，镜头晃动，{NEGATIVE}"
"""Those of Wan2.1's I2V-14B and FLF2V (wan/configs/wan_i2v_14B.py)."""

PUSA_NEGATIVE = (
    "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, "
    "static, overall gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, "
    "extra fingers, poorly drawn hands, poorly drawn faces, deformed, disfigured, misshapen limbs, "
    "fused fingers, still picture, messy background, three legs, many people in the background, "
    "walking backwards"
)
"""Pusa's, in its scripts."""

COMMON = {"process": "flow", "schedule": "together", "shift": 5.0}
WAN = COMMON | {"solver": "unipc", "spacing": "wan", "fps": 16, "guidance": 5.0, "negative": NEGATIVE}
PUSA = COMMON | {"solver": "euler", "spacing": "pusa", "kept": 0.2, "negative": PUSA_NEGATIVE}
EXPERTS = {"boundary": 0.875}

PRESETS: dict[str, dict] = {
    "wan-t2v": WAN | {"steps": 50},
    "wan-i2v": WAN | {"steps": 40, "negative": I2V_NEGATIVE},
    "wan-flf2v": WAN | {"steps": 50, "shift": 16.0, "negative": FLF2V_NEGATIVE},
    "wan22-t2v": WAN | EXPERTS | {"steps": 40, "shift": 12.0, "guidance": (4.0, 3.0)},
    "wan22-i2v": WAN | {"steps": 40, "guidance": 3.5, "boundary": 0.9},
    "ti2v-5b": WAN | {"steps": 50, "fps": 24},
    "pusa-wan21": PUSA | {"steps": 30, "guidance": 3.0, "fps": 25, "strengths": (1.4,)},
    "pusa-wan21-lightning": PUSA | {"steps": 4, "guidance": 1.0, "fps": 25, "strengths": (1.0, 1.4)},
    "pusa-wan22": PUSA | EXPERTS | {"steps": 30, "guidance": 3.0, "fps": 24, "strengths": (1.4,)},
    "pusa-wan22-lightning": PUSA
    | EXPERTS
    | {"steps": 4, "guidance": 1.0, "fps": 24, "strengths": (1.0, 1.4)},
    "wan22-lightning": WAN
    | EXPERTS
    | {"solver": "euler", "spacing": "pusa", "steps": 4, "guidance": 1.0, "strengths": (1.0,)},
}
"""By name. Beside a request's settings: `strengths`, of an expert's `--lora` in the order given, and 1 for
those that follow (Lightning goes first, as Pusa merges it); and `kept`, of a `--keep` that states none.

Wan's READMEs have shift 3 for I2V at 480p, and 8 with guidance 6 for 1.3B, which `convert` gives those
models as their own, and a preset goes before them. Guidance of two experts is (high noise, low noise).
Pusa's README writes 1.4 for every LoRA, its text-to-video script 1.3 for the expert of high noise:
`--lora high=DIR:1.3`.
"""
