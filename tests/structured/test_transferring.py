"""Heads chosen on the pre-training model are cut out of the downstream models."""

from __future__ import annotations

import pytest
from structured_examples import prepared, random_record

from vlp_plugins.runtime.errors import StructureError
from vlp_plugins.structured.check import check_equal, example_batch, outputs
from vlp_plugins.structured.cuts import cut, masked, transferred
from vlp_plugins.structured.record import Kept, Record
from vlp_plugins.structured.survey import blocks_of


@pytest.mark.parametrize("name", ["blip retrieval", "blip captioning", "blip vqa"])
def test_downstream_models_keep_what_the_pretraining_model_keeps(name: str) -> None:
    record = random_record(*prepared("blip pre-training"))
    model, adapter = prepared(name)
    # The heads of the image tower are larger there.
    record = Record((n, k) for n, k in record.items() if not n.startswith("vision."))
    found = transferred(model, adapter, record)
    expected = {
        block.name: record[block.name.replace("decoder", "text") if "vqa" in name and
                           not block.name.endswith("self") else block.name]
        for block in blocks_of(model, adapter)
        if block.modality != "vision"
    }  # fmt: skip
    assert dict(found) == expected
    batch = example_batch(model, adapter)
    with masked(model, adapter, found):
        wanted = outputs(model, adapter, batch)
    cut(model, adapter, found)
    check_equal(wanted, outputs(model, adapter, batch))


def test_the_answering_decoder_of_xvlm_follows_the_fusion_layers() -> None:
    record = random_record(*prepared("xvlm"))
    found = transferred(*prepared("xvlm vqa"), record)
    assert found["decoder.0.self"] == record["fusion.0.self"]
    assert found["decoder.0.ffn"] == record["fusion.0.ffn"]
    assert found["vision.1.mlp"] == record["vision.1.mlp"]


def test_a_record_of_another_family_is_refused() -> None:
    model, adapter = prepared("vit")
    with pytest.raises(StructureError, match="no block of the record"):
        transferred(model, adapter, Record({"text.0.self": Kept(heads=(0,))}))
    with pytest.raises(StructureError, match="no head 7"):
        transferred(model, adapter, Record({"vision.0.attention": Kept(heads=(7,))}))
    other = Record({"vision.0.attention": Kept(heads=(0,))}, "clip")
    for refused in (transferred, cut):
        with pytest.raises(StructureError, match="of adapter 'clip', and this one is of"):
            refused(model, adapter, other)
