"""What people do wrong: the command, and what they are told. `{names}` are of `bad_world.make`."""

from __future__ import annotations

PRUNE = "prune --out {out} --model {xvlm} --data {photos} --batch-size 4"
HALF = f"{PRUNE} --sparsity 0.5"
MAGNITUDE = "prune --out {out} --method omp --sparsity 0.5"

SPARSITIES = [
    (f"{PRUNE} --sparsity 1.0", r"lies in \[0, 1\), not 1"),
    (f"{PRUNE} --sparsity 0.5 -0.1", r"lies in \[0, 1\), not -0.1"),
    (f"{PRUNE} --sparsity 63", r"not 63; did you mean 0.63\?"),
    (f"{PRUNE} --sparsity much", r"'much' is not a sparsity; write 0.75, or vision=0.5"),
    (PRUNE, r"no sparsity given"),
    (f"{PRUNE} --sparsity 0.5 0.50", r"sparsity 0.5 is given twice"),
    (f"{PRUNE} --sparsity vison=0.5", r"'vison'.*did you mean 'vision'"),
    (f"{PRUNE} --sparsity vision=0.5", r"modality 'text'.*each of vision, text, fusion"),
    (f"{PRUNE} --sparsity vision=0.5 --allocation global", r"use allocation='modality'"),
    (f"{PRUNE} --sparsity 0.9 --floor 0.2", r"floor of 0.2 and sparsity 0.9 exclude each other"),
    (f"{PRUNE} --allocation keep=1,of=5", r"1 of 5 does not divide the 16 inputs of"),
]
NAMES = [
    (f"{HALF} --method multflow", r"no method is called 'multflow' .did you mean 'multiflow'\?"),
    (f"{HALF} --parameter edgse=false", r"no parameter 'edgse'.*edges"),
    (f"{HALF} --parameter edges", r"'edges' is not a parameter; write name=value"),
    (f"{HALF} --adapter xvml", r"no adapter is called 'xvml' .did you mean 'xvlm'"),
    (f"{HALF} --adapter vit", r"adapter 'vit' does not know XvlmForPretraining; leave it out"),
    (f"{HALF} --allocation layerwise", r"unknown allocation 'layerwise'.*layer"),
    (f"{HALF} --device gpu", r"device 'gpu' cannot be used .*; write cpu, or leave it out"),
    (f"{HALF} --dtype fp32", r"dtype 'fp32' is none of auto, float32, bfloat16, float16"),
    ("prune {recipe}", r"line 1: unknown key 'methdo' .did you mean 'method'"),
    ("prune {empty}/recipe.yaml", r"cannot read recipe .*: No such file"),
]
MODELS = [
    (MAGNITUDE, r"no model given; pass --model, or write `model: ...` in the recipe"),
    (f"{MAGNITUDE} --model {{empty}}/model", r"model .* does not exist: check the path"),
    (f"{MAGNITUDE} --model nobody/nothing", r"no such file or folder, and as a hub id"),
    (f"{MAGNITUDE} --model {{photos}}", r"has no config.json; give the model's own folder"),
    (f"{MAGNITUDE} --model {{noise}}", r"a checkpoint file that no adapter recognises; give"),
    (f"{MAGNITUDE} --model {{xvlm}}/model.safetensors", r"give the folder that it is in"),
    (
        f"{MAGNITUDE} --model {{chinese_clip}} --adapter clip",
        r"'clip' does not know ChineseCLIPModel; leave it out .*'module'",
    ),
    (
        f"{MAGNITUDE} --model {{truncated_model}}",
        r"is truncated: it has \S+ of \S+ bytes; copy it again",
    ),
    (
        f"{MAGNITUDE} --model {{truncated_clip}} --adapter module",
        r"is truncated: it has \S+ of \S+ bytes",
    ),
    (f"{MAGNITUDE} --model {{lacking}}", r"lacks 1 parameter.*intermediate.dense"),
    (
        f"{MAGNITUDE} --model {{lacking_clip}} --adapter module",
        r"lacks 1 weights of ChineseCLIPModel",
    ),
    (f"{HALF} --model {{nan_weight}}", r"weight 'text.0.ffn.fc1' .*16 NaN or infinite elements"),
    (f"{HALF} --model {{nan_input}}", r"input of .*layer.0.attention.self.query .*in batch 0;"),
    (f"{HALF} --model {{no_processor}}", r"no processor at .*preprocessor_config.json"),
]
DATA = [
    ("prune --out {out} --model {xvlm} --sparsity 0.5", r"give --data FOLDER .*--statistics FILE"),
    (f"{HALF} --data {{empty}}", r"empty is empty; put images and metadata.jsonl into it"),
    (f"{HALF} --data {{empty}}/a/b", r"data .* does not exist: check the path"),
    (f"{HALF} --data {{no_metadata}}", r"has no metadata.jsonl or .*12 images found"),
    (f"{HALF} --data {{missing_images}}", r"names 1 of 12 images that do not exist .*003.png"),
    (f"{HALF} --data {{damaged_images}}", r"6 of 100 records .*094.png.*more than 5% is too many"),
    (f"{HALF} --caption-column words", r"no column 'words'"),
    (f"{HALF} --statistics {{empty}}/s", r"is not a file"),
    (f"{HALF} --statistics {{truncated_statistics}}", r"damaged, truncated or no statistics file"),
    (f"{HALF} --statistics {{corrupt_statistics}}", r"the checksum differs"),
    (f"{HALF} --model {{vit}} --statistics {{statistics}}", r"are of another model"),
    (f"{HALF} --variant published --statistics {{statistics}}", r"gathered with variant='default'"),
]
MASKS = [
    ("masks show {corrupt_masks}", r"is damaged.*make or copy it again"),
    ("masks verify {truncated_masks} {xvlm}", r"damaged.*truncated.*make or copy it again"),
    ("masks show {noise}", r"noise.bin is .*no mask file"),
    ("masks show {xvlm}/model.safetensors", r"perhaps a checkpoint\?"),
    ("masks diff {masks} {empty}/x", r"is not a file"),
    ("masks apply {xvlm} {masks} --out {out}", r"not a file of masks: FILE comes first"),
    ("masks verify {xvlm} {masks}", r"not a file of masks: FILE comes first"),
    ("masks apply {masks} {vit} --out {out}", r"adapter 'xvlm'.*; use masks made for a model of"),
    ("masks verify {masks} {wider}", r"the mask of .* is \[24, 16\], but the weight is \[32, 16\]"),
    ("masks import {noise} {xvlm} --out {out}", r"nothing in it was executed: copy it again"),
    ("masks export {masks} {vit} --out {out}", r"use masks made for a model of"),
]
OUTPUTS = [
    (f"{HALF} --out {{taken}}", r"folder .*taken exists and is not empty; give another one"),
    (f"{HALF} --out {{noise}}", r"noise.bin is a file; give the path of a folder"),
    (f"{HALF} --out {{noise}}/out", r"cannot write .*noise.bin.*; nothing was written"),
    ("prune --model {xvlm} --sparsity 0.5", r"no out given; pass --out"),
    (
        "evaluate {xvlm} --task retrieval --data {photos} --overwrite",
        r"--overwrite replaces the folder --out, and none is given",
    ),
    ("masks apply {masks} {xvlm} --out {taken}", r"is not empty; give another one"),
    ("masks invert {masks} --out {taken}", r"is a folder; give the path of a file"),
]
MISTAKES = [*SPARSITIES, *NAMES, *MODELS, *DATA, *MASKS, *OUTPUTS]
