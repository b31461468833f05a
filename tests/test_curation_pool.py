"""The pool of pictures: sources, duplicates, licences; and groups of its images."""

import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import skimage.data
from curation_parts import tiny_pictures, tiny_settings
from PIL import Image

from imagent_jax.curation.groups import make_groups
from imagent_jax.curation.likeness import Known, histogram, look_of
from imagent_jax.curation.pool import Pool, build_pool, pictures_of, showable
from imagent_jax.curation.settings import GroupSettings, PoolSettings
from imagent_jax.images.decode import read_image
from imagent_jax.tiny.curators import make_pictures
from imagent_jax.tiny.world import make_scene

NAMES = ("astronaut", "coffee", "chelsea", "rocket", "camera", "coins", "page", "brick", "grass", "gravel", "moon")


@pytest.fixture(scope="module")
def photos():
    return [Image.fromarray(getattr(skimage.data, name)()).convert("RGB").resize((400, 300)) for name in NAMES]


def encoded(image, kind="PNG", **options):
    image.save(out := io.BytesIO(), kind, **options)
    return out.getvalue()


def cropped(image, share):
    w, h = image.size
    return image.crop((round(w * share), round(h * share), round(w * (1 - share)), round(h * (1 - share))))


COPIES = {
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2)),
    "larger": lambda image: image.resize((round(image.width * 1.7), round(image.height * 1.7))),
    "JPEG of quality 30": lambda image: Image.open(io.BytesIO(encoded(image, "JPEG", quality=30))),
    "a little darker": lambda image: image.point(lambda v: round(0.9 * v)),
    "3 % of each side cut": lambda image: cropped(image, 0.03),
    "6 % of each side cut": lambda image: cropped(image, 0.06),
}


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_is_the_same_picture(photos, copy):
    known = Known()
    for name, photo in zip(NAMES, photos, strict=True):
        assert known.find(look_of(photo)) is None, f"{name} is taken for another photograph"
        known.add(name, look_of(photo))
    assert [known.find(look_of(COPIES[copy](photo))) for photo in photos] == list(NAMES)


def test_other_scenes_on_the_same_photograph_are_other_pictures():
    known, rng, same = Known(), np.random.default_rng(0), 0
    for number in range(80):  # pieces of ten photographs: many have the same place of the same photograph behind other tags
        look = look_of(Image.fromarray(make_scene(rng, "train").pixels))
        same += known.find(look) is not None
        known.add(str(number), look)
    assert same <= 1


def test_a_tag_of_another_colour_is_another_picture(photos):
    looks = []
    for colour in ("#ec1c24", "#326eff"):  # of about the same brightness
        image = photos[1].convert("L").convert("RGB")
        image.paste(colour, (180, 120, 220, 160))
        looks.append(look_of(image))
    known = Known()
    known.add("red", looks[0])
    assert np.bitwise_count(looks[0].hashes[0] ^ looks[1].hashes[0]) <= 8
    assert known.find(looks[0]) == "red" and known.find(looks[1]) is None


def test_known_pictures_are_found_when_there_are_many(photos):
    known, rng = Known(), np.random.default_rng(0)
    looks = [look_of(Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8))) for _ in range(130)]
    for number, look in enumerate(looks):
        known.add(str(number), look)
    assert [known.find(look) for look in looks] == [str(number) for number in range(130)] and known.find(
        look_of(photos[0])
    ) is None


def folder_of(photos, folder):
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "a.png").write_bytes(encoded(photos[0]))
    (folder / "deep" / "same.png").write_bytes(encoded(photos[0]))
    (folder / "deep" / "er" / "b.jpg").write_bytes(encoded(photos[1], "JPEG", quality=90))
    (folder / "deep" / "near.jpg").write_bytes(encoded(photos[1].resize((300, 225)), "JPEG", quality=60))
    (folder / "small.png").write_bytes(encoded(photos[2].resize((20, 20))))
    (folder / "torn.png").write_bytes(encoded(photos[3])[:500])
    (folder / "notes.txt").write_text("no picture")
    (folder / "licences.csv").write_text("file,licence,origin,city\na.png,CC0,https://example.org/a,Bern\n")
    return folder


def test_a_line_separator_in_a_column_ends_no_line_of_the_pool(photos, tmp_path):
    source = folder_of(photos, tmp_path / "in")
    (source / "licences.csv").write_text("file,licence,origin\na.png,CC0,by\u2028Anna\x85\n", encoding="utf-8-sig")
    pool = build_pool(PoolSettings(path=str(source)), 0, tmp_path / "run")
    assert len(pool.pictures) == 2 and "by\u2028Anna\x85" in {picture.origin for picture in pool.pictures.values()}


def test_a_folder_becomes_a_pool_without_duplicates_that_knows_licences(photos, tmp_path):
    source = folder_of(photos, tmp_path / "in")
    pool = build_pool(PoolSettings(path=str(source), licence="mine"), 0, tmp_path / "run")
    one, two = sorted(pool.pictures.values(), key=lambda picture: picture.licence)
    assert (one.licence, one.origin, one.facts) == ("CC0", "https://example.org/a", {"folder": "in", "city": "Bern"})
    assert (two.licence, two.origin, two.facts["folder"]) == ("mine", "deep/er/b.jpg", "er") and two.width == 400
    assert pool.dropped == {"does not decode": 1, "too small": 1, "equal file": 1, "near duplicate": 1}
    assert pool.data(one.id) == (source / "a.png").read_bytes() and pool.image(two.id).size == (400, 300)
    again = build_pool(PoolSettings(path="gone", near=False), 0, tmp_path / "run")  # what stands there is not built again
    assert again.pictures == pool.pictures == Pool(tmp_path / "run").pictures
    with_near = build_pool(PoolSettings(path=str(source), near=False), 0, tmp_path / "other")
    assert len(with_near.pictures) == 3 and with_near.dropped["near duplicate"] == 0


def test_shards_of_webdataset_give_pictures_with_the_facts_of_their_sample(photos, tmp_path):
    for shard in (0, 1):
        with tarfile.open(tmp_path / f"s-{shard}.tar", "w") as tar:
            for number in (0, 1):
                facts = json.dumps({"license": "CC-BY", "page": number, "tags": ["no", "text"]}).encode()
                for name, data in (("jpg", encoded(photos[2 * shard + number], "JPEG")), ("json", facts), ("txt", b"words")):
                    info = tarfile.TarInfo(f"dir/{number:03d}.{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    found = list(pictures_of(str(tmp_path / "s-*.tar")))
    places = [(shard, number) for shard in (0, 1) for number in (0, 1)]
    origins = [{"origin": f"s-{shard}.tar:dir/{number:03d}", "license": "CC-BY", "page": str(number)} for shard, number in places]
    assert [facts for _, facts in found] == origins
    pool = build_pool(PoolSettings(path=str(tmp_path / "s-*.tar")), 0, tmp_path / "run")
    assert len(pool.pictures) == 4 and {picture.licence for picture in pool.pictures.values()} == {"CC-BY"}
    with tarfile.open(tmp_path / "list.tar", "w") as tar:
        info.name, info.size = "7.json", 3
        tar.addfile(info, io.BytesIO(b"[1]"))
    with pytest.raises(ValueError, match=r"list\.tar cannot be read \(7\.json is no JSON object\)"):
        list(pictures_of(str(tmp_path / "list.tar")))
    (tmp_path / "bad.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match=r"bad\.tar cannot be read .*write it again"):
        list(pictures_of(str(tmp_path / "bad.tar")))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rows_of_a_data_set_give_their_images(photos, tmp_path, suffix):
    (tmp_path / "1.png").write_bytes(encoded(photos[0]))
    if suffix == "jsonl":
        rows = [{"question": "?", "answer": "1", "images": ["1.png"], "licence": "CC0"}, {"images": ["1.png", "1.png"]}]
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import pyarrow
        import pyarrow.parquet

        images = [{"bytes": encoded(photo), "path": None} for photo in photos[:3]]
        rows = [{"images": images[:1], "licence": "CC0"}, {"images": images[1:], "licence": None}]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    found = list(pictures_of(str(tmp_path / f"train.{suffix}")))
    assert [facts["origin"].partition("#")[2] for _, facts in found] == ["1", "2", "2"]
    assert found[0][0] == encoded(photos[0]) and found[0][1]["licence"] == "CC0" and "licence" not in found[1][1]


def test_a_source_without_pictures_is_a_sentence(tmp_path):
    (tmp_path / "latin").mkdir()
    (tmp_path / "latin" / "x.png").write_bytes(b"no")
    (tmp_path / "latin" / "licences.csv").write_bytes("file,licence\nx.png,Zürich\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"licences\.csv cannot be read .* write it as CSV in UTF-8"):
        list(pictures_of(str(tmp_path / "latin")))
    (tmp_path / "train.jsonl").write_text('{"question": "?", "answer": "1", "images": ["gone.png"]}\n')
    with pytest.raises(ValueError, match=r"line 1: an image cannot be read .*gone\.png"):
        list(pictures_of(str(tmp_path / "train.jsonl")))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.png").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"has no picture that can be used .*'does not decode': 1"):
        build_pool(PoolSettings(path=str(tmp_path / "in")), 0, tmp_path / "run")


def torn_off(folder, count, seed):
    make_pictures(folder, 2, seed)
    raise KeyboardInterrupt


def test_pictures_that_were_not_all_made_are_made_again(tmp_path):
    whole = PoolSettings(path=str(tmp_path / "whole" / "in"), make="imagent_jax.tiny.curators:make_pictures", make_count=6)
    cut = replace(whole, path=str(tmp_path / "cut" / "in"))
    with pytest.raises(KeyboardInterrupt):
        build_pool(replace(cut, make="test_curation_pool:torn_off"), 0, tmp_path / "run")
    pools = [build_pool(cfg, 0, tmp_path / name) for cfg, name in ((whole, "other"), (cut, "run"))]
    assert pools[0].pictures == pools[1].pictures and len(pools[0].pictures) > 2
    made = [sorted(p.name for p in (tmp_path / name).iterdir()) for name in ("whole", "cut")]
    assert made == [["in", "in_test"]] * 2
    stamp = (tmp_path / "cut" / "in" / "scenes.json").stat().st_mtime_ns
    build_pool(cut, 0, tmp_path / "third")
    assert (tmp_path / "cut" / "in" / "scenes.json").stat().st_mtime_ns == stamp  # what is whole is not made again


# ---- groups -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tiny_pictures(tmp_path_factory.mktemp("groups"), 40)
    return build_pool(tiny_settings(folder).pool, 0, folder / "run")


def test_groups_share_no_picture_and_depend_on_the_seed_alone(pool):
    cfg = GroupSettings(sizes=(2, 5), ways={"similar": 1.0, "random": 1.0, "photo": 1.0})
    groups = make_groups(cfg, pool, 1)
    images = [image for group in groups for image in group.images]
    assert len(images) == len(set(images)) and len(images) >= len(pool.pictures) - 1
    assert {group.way for group in groups} == {"similar", "random", "photo"} and {len(g.images) for g in groups} == {2, 5}
    assert make_groups(cfg, pool, 1) == groups != make_groups(cfg, pool, 4)


def test_a_group_by_a_column_has_one_value_of_it(pool):
    groups = make_groups(GroupSettings(sizes=(2,), ways={"photo": 1.0}), pool, 0)
    assert len(groups) > 10
    assert all(len({pool.pictures[image].facts["photo"] for image in group.images}) == 1 for group in groups)
    with pytest.raises(ValueError, match="names the column 'town', which no picture has"):
        make_groups(GroupSettings(ways={"town": 1.0}), pool, 0)
    own = Pool(pool.folder)
    own.pictures = {name: replace(picture, facts={"number": str(n)}) for n, (name, picture) in enumerate(own.pictures.items())}
    with pytest.raises(ValueError, match="No 2 pictures have one value of number; add similar or random"):
        make_groups(GroupSettings(ways={"number": 1.0}), own, 0)
    single = Pool(pool.folder)
    single.pictures = dict([*single.pictures.items()][:1])
    with pytest.raises(ValueError, match="The pool has 1 pictures, and a group takes 2"):
        make_groups(GroupSettings(), single, 0)


def test_a_group_by_similarity_holds_the_nearest_that_are_left(pool):
    [first, *_] = make_groups(GroupSettings(sizes=(4,), ways={"similar": 1.0}), pool, 1)
    begin, *others = first.images
    vectors = {name: histogram(pool.image(name)) for name in pool.pictures}
    far = {name: np.linalg.norm(vectors[name] - vectors[begin]) for name in pool.pictures if name != begin}
    assert sorted(others, key=far.get) == sorted(far, key=far.get)[:3]


def brightness(image):
    return np.array([1.0, np.asarray(image).mean() / 255])


def test_an_embedding_of_ones_own_decides_what_is_alike(pool, monkeypatch):
    cfg = GroupSettings(sizes=(2,), ways={"similar": 1.0}, embedding="test_curation_pool:brightness")
    group = make_groups(cfg, pool, 0)[0]
    light = {name: brightness(pool.image(name))[1] for name in pool.pictures}
    nearest = min(
        (n for n in light if n != group.images[0]), key=lambda n: abs(np.arctan(light[n]) - np.arctan(light[group.images[0]]))
    )
    assert group.images[1] == nearest


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("turn", [1, 6])
def test_a_picture_is_sent_as_it_is_or_as_an_upright_png(kind, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    options = {} if kind in ("GIF", "BMP") else {"exif": exif}
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)).save(file := io.BytesIO(), kind, **options)
    data, mime = showable(file.getvalue())
    turned = turn == 6 and bool(options)
    if kind in ("TIFF", "BMP") or turned:
        assert mime == "image/png" and data[:4] == b"\x89PNG"
    else:
        assert (data, mime) == (file.getvalue(), f"image/{kind.lower()}")
    plain = Image.open(io.BytesIO(data))  # as a server sees it that knows no EXIF
    assert plain.size == ((24, 40) if turned else (40, 24))
    assert np.array_equal(plain.convert("RGB"), read_image(file.getvalue()))


@pytest.mark.parametrize("exif", [b"no TIFF header", b"II*\0"])
def test_a_picture_whose_exif_data_is_damaged_is_sent_as_a_png(photos, exif):
    file = encoded(photos[0], "WEBP", exif=b"Exif\0\0" + exif)
    data, mime = showable(file)
    assert mime == "image/png" and np.array_equal(read_image(data), read_image(file))
