"""How published models are sampled by their authors, under one name each: what `--preset` sets.

A value that a flag gives goes before a preset's, and a preset's before the model's own. Sources: Wan2.1 and
Wan2.2, wan/configs and generate.py; Pusa-VidGen at 8a8c4f5, the scripts of examples/pusavideo and its README
(strength of its LoRA 1.3 to 1.5, kept images at 0.2); Wan2.2-Lightning, four steps without guidance.
"""

COMMON = {"process": "flow", "schedule": "together", "shift": 5.0}
WAN = COMMON | {"solver": "unipc", "spacing": "wan", "fps": 16, "guidance": 5.0}
PUSA = COMMON | {"solver": "euler", "spacing": "pusa", "kept": 0.2}
EXPERTS = {"boundary": 0.875}

PRESETS: dict[str, dict] = {
    "wan-t2v": WAN | {"steps": 50},
    "wan-i2v": WAN | {"steps": 40},
    "wan-flf2v": WAN | {"steps": 50, "shift": 16.0},
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
"""By name. Beside a request's settings: `strengths`, of an expert's `--lora` in the order given, the last for
those that follow (Lightning goes first, as Pusa merges it); and `kept`, of a `--keep` that states none.

Wan's READMEs have shift 3 for I2V at 480p, and 8 with guidance 6 for 1.3B, which `convert` gives that
model as its own, and a preset goes before them. Guidance of two experts is (high noise, low noise).
Pusa's README writes 1.4 for every LoRA, its text-to-video script 1.3 for the expert of high noise:
`--lora high=DIR:1.3`.
"""
