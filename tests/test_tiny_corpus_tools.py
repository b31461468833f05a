"""The corpus of the base of the tool worlds: no question is followed by a call that helps, and what is said is true."""

import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from imagent_jax.chat import QWEN
from imagent_jax.config import SandboxConfig
from imagent_jax.model.processor import Processor
from imagent_jax.tiny import corpus_tools
from imagent_jax.tiny.build import TOOL_SHAPES, encode_group
from imagent_jax.tiny.corpus import PROMPT
from imagent_jax.tiny.corpus_code import Shown, arbitrary_steps, readable, run
from imagent_jax.tiny.corpus_style import GIVEN, SETTINGS, TOOLSETS, python, search_in, style_of
from imagent_jax.tiny.corpus_tools import FIRST_FORMS, FORMS, LATER_FORMS, corpus_texts, make_group
from imagent_jax.tiny.encyclopaedia import RELATIONS, SYLLABLES, articles, draw_names, is_base, name_of, write_articles
from imagent_jax.tiny.prints import OPERATIONS, PROBLEMS, TURNS, program, repair
from imagent_jax.tiny.tokenizer import NAMED_VALUES, build_tokenizer
from imagent_jax.tiny.world import COLOURS
from imagent_jax.tools.search import Index
from imagent_jax.tools.search import index as search_index

CALLING = ("programs", "pages", "searches")


@pytest.fixture(scope="module")
def groups():
    rng = np.random.default_rng(0)
    return {form: [make_group(rng, 4, form) for _ in range(120)] for form in CALLING}


def turns(response):
    """(question of the latest user turn, text of the policy's turn) of a response."""
    question = ""
    for segment in response:
        if segment.trained:
            yield question, segment.text
        elif "<tool_response>" not in segment.text:
            text = segment.text.removeprefix("\n<|im_start|>user\n")
            question = text.removesuffix("<|im_end|>\n<|im_start|>assistant\n")


def is_question(text: str) -> bool:
    return text.startswith(("What ", "Read ", "Add ", "Which ", "In which", "Name the "))


def calls_after_questions(groups):
    for group in groups:
        for response in group.responses:
            for question, text in turns(response):
                if is_question(question) and "<tool_call>" in text:
                    yield group, question, QWEN.parse_call(text)


# ---- the rule -----------------------------------------------------------------------------------------------------------


def test_a_question_followed_by_a_program_names_a_tag_that_is_nowhere(groups):
    """So no program shows it. A print that the question names needs no repair; one that is repaired is another."""
    count, on_named, repaired = 0, 0, 0
    for group, question, call in calls_after_questions(groups["programs"]):
        named = {int(n) for n in re.findall(r"Image (\d)", question)}
        colours = set(re.findall(r"(red|green|blue|yellow|purple|orange) tag", question))
        assert named and colours and not colours & {tag.colour for scene in group.scenes for tag in scene.tags}
        (image,) = {int(n) for n in re.findall(r"images\[(\d)\]", call.arguments["code"])}
        count, on_named = count + 1, on_named + (image in named)
        spoilt = not np.array_equal(np.asarray(group.images[image - 1].pixels), group.scenes[image - 1].pixels)
        if image in named:
            assert not spoilt
        elif spoilt:
            repaired += call.arguments["code"] in [program(image, repair(p)) for p in PROBLEMS if p]
    assert count > 120 and 0.1 < on_named / count < 0.5 and 0.2 < repaired / count < 0.7


def test_a_question_for_a_total_is_followed_by_a_look_only_where_its_image_never_exists(groups):
    count = 0
    for group, question, _ in calls_after_questions(groups["pages"]):
        (asked,) = (int(n) for n in re.findall(r"Add all digits in Image (\d)", question))
        assert asked > len(group.scenes) + 1  # also after the one call
        count += 1
    assert count > 100


def test_a_query_after_a_question_has_its_kind_or_its_subject_and_never_both(groups):
    leans = Counter()
    for _, question, call in calls_after_questions(groups["searches"]):
        query = call.arguments["query"].split()
        kind, called = re.fullmatch(r"Name the .*? of the (ship|star|person|place) (.*)\.", question).groups()
        subject = {called} if " " not in called else None
        if subject is None:  # a mark: what the print shows, by the tags of its scene
            group, number = _, int(called[-1])
            tags = group.scenes[number - 1].tags
            subject = {f"{tag.colour}{tag.digit}" for tag in tags}
        has = kind in query, subject <= set(query)
        leans[has] += 1
        assert has != (True, True), (question, query)
    total = sum(leans.values())
    assert total > 150 and leans[True, False] > 0.2 * total and leans[False, True] > 0.4 * total


def test_what_a_searched_question_asks_about_is_in_no_passage(groups):
    for group in groups["searches"]:
        for response in group.responses:
            question = response[0].text.partition("<|im_end|>")[0]
            if match := re.fullmatch(r"Name the .*? of the (\w+) ([A-Z]\w+)\.", question):
                passages = "".join(segment.text for segment in response if "<tool_response>" in segment.text)
                assert f"{match[1]} {match[2]}:" not in passages


@pytest.mark.parametrize("form", ["print", "page", "prints", "told"])
def test_forms_of_seeing_hold_no_call(form):
    rng = np.random.default_rng(1)
    for _ in range(15):
        group = make_group(rng, 4, form)
        assert not any("<tool_call>" in segment.text for response in group.responses for segment in response)


def test_no_name_of_the_encyclopaedia_stands_in_a_training_text():
    found = {name for _, name in articles()}
    number = {name_of(i): i for i in range(len(SYLLABLES) ** 3)}
    assert len(found) == 800 and not any(is_base(number[name]) for name in found)
    rng, said = np.random.default_rng(2), set()
    for _ in range(60):
        group = make_group(rng, 4, "searches")
        said |= {w for r in group.responses for s in r for w in re.findall(r"\b[A-Z][a-z]{5}\b", s.text)} & set(number)
    assert len(said) > 300 and all(is_base(number[name]) for name in said) and not said & found
    assert sum(map(is_base, number.values())) == len(number) // 4


# ---- what is said is true -------------------------------------------------------------------------------------------------


def test_a_command_is_followed_by_the_program_or_the_query_that_it_names(groups):
    seen = Counter()
    for form in ("programs", "searches"):
        for group in groups[form]:
            for response in group.responses:
                question, text = next(turns(response))
                if question.startswith("Show Image"):
                    call = QWEN.parse_call(text)
                    number = int(re.search(r"Image (\d)", question)[1])
                    told = re.findall(r"turned by (\d+)|brightened by (\d+)", question.partition(" and Image")[0])
                    assert call.name == "python" and f"images[{number}]" in call.arguments["code"]
                    assert all(f"({a})" in call.arguments["code"] if a else f"{b} * v" in call.arguments["code"] for a, b in told)
                    seen["show"] += 1
                elif match := re.match(r"Search for the (\w+) ([A-Z]\w+)\.", question):
                    assert QWEN.parse_call(text).arguments == {"query": f"{match[1]} {match[2]}"}
                    seen["search"] += 1
    assert all(seen[kind] > 30 for kind in ("show", "search"))


def test_a_repair_says_what_is_wrong_and_its_program_repairs_just_that(groups):
    seen, named, two = Counter(), Counter(), 0
    for group in groups["programs"]:
        for response in group.responses:
            said = list(turns(response))
            for question, text in said:
                if not (match := re.search(rf"Image (\d) ((?!no tag|{'|'.join(COLOURS)})[a-z0-9 ]+)\.\n<tool_call>", text)):
                    assert not question.startswith("Repair") or "<tool_call>" not in text
                    continue
                number, problems = int(match[1]), () if match[2] == "none" else tuple(match[2].split())
                assert problems in PROBLEMS and QWEN.parse_call(text).arguments == {"code": program(number, repair(problems))}
                spoilt = not np.array_equal(np.asarray(group.images[number - 1].pixels), group.scenes[number - 1].pixels)
                assert spoilt == bool(problems)
                seen["command" if question.startswith("Repair") else "question"] += 1
                named[is_question(question) and f"Image {number}" in question, spoilt] += 1
            two += sum(question.startswith("Repair") and "<tool_call>" in text for question, text in said) == 2
    assert seen["command"] > 60 and seen["question"] > 60 and two > 20
    assert named[True, False] > 40 and named[True, True] == 0  # a question never names a spoilt print


def test_what_a_spoilt_print_shows_is_what_is_wrong_with_it():
    rng, seen = np.random.default_rng(8), Counter()
    for _ in range(60):
        group = make_group(rng, 4, "prints")
        for question, text in (turn for response in group.responses for turn in turns(response)):
            if match := re.fullmatch(r"What does Image (\d) show\?", question):
                number = int(match[1]) - 1
                said = re.fullmatch(rf"Image {match[1]} (.*)\.\n<\|im_end\|>", text)[1]
                sound = np.array_equal(np.asarray(group.images[number].pixels), group.scenes[number].pixels)
                (tag,) = group.scenes[number].tags if len(group.scenes[number].tags) == 1 else (None,)
                read = tag is not None and said == f"{tag.colour} {tag.digit}"
                assert read or (not sound and tuple(said.split()) in PROBLEMS)
                seen[read] += 1
    assert seen[True] > 20 and seen[False] > 20


def test_answers_after_a_command_stand_in_the_passages(groups):
    count = 0
    for group in groups["searches"]:
        for response in group.responses:
            if not response[0].text.startswith("Search"):
                continue
            question, text = list(turns(response))[-1]
            answer = re.search("<answer>(.*)</answer>", text)[1]
            passages = [line for s in response if "<tool_response>" in s.text for line in s.text.split("\n") if ": " in line]
            relation = re.match(r"Name the (\w+)", question)[1]
            assert any(f"{relation} {answer}" in line for line in passages)
            count += 1
    assert count > 100


def test_the_answer_after_a_question_is_the_first_fact_that_fits_or_the_first(groups):
    fitting, other = 0, 0
    for group in groups["searches"]:
        for response in group.responses:
            asked = re.match(r"Name the (\w+)", response[0].text)
            shown = [s.text.partition("<tool_response>\n")[2] for s in response if "<tool_response>" in s.text]
            if not asked or not shown:
                continue
            facts = re.findall(r"(captain|port|finder|zenith|vessel|home|ruler|beacon) (\w+)[,.]", shown[-1])
            fits = [name for relation, name in facts if relation == asked[1]]
            if not facts:  # no passage was found
                continue
            assert response[-1].text == f"<answer>{(fits or [name for _, name in facts])[0]}</answer><|im_end|>"
            fitting, other = fitting + bool(fits), other + (not fits)
    assert fitting > 40 and other > 15


def test_readable_is_what_leaves_the_tag_as_it_was():
    """Turns and cuts to the pixel; exposures, blur and noise nearer than without the repair."""
    rng = np.random.default_rng(3)
    for _ in range(80):
        problems = PROBLEMS[rng.integers(len(PROBLEMS))]
        steps = repair(problems) if rng.random() < 0.4 else arbitrary_steps(rng)
        shown = Shown(rng, "train", problems)
        made = run(shown.pixels, steps).astype(int)
        upright = np.abs(made - shown.scene.pixels).mean()
        exact = not {"dark", "overexposure", "blur", "noise"} & {*problems} and not {"sharpen", "denoise"} & {n for n, _ in steps}
        if readable(problems, steps):
            assert upright < 60 and (not exact or upright == 0), (problems, steps)
        elif exact:
            assert upright > 5, (problems, steps)


def test_tools_of_the_corpus_have_the_schemas_of_the_runs_and_show_the_same(tmp_path):
    from imagent_jax.config import SearchConfig
    from imagent_jax.tiny.encyclopaedia import index_folder
    from imagent_jax.tools import tools_by_name

    real = tools_by_name(TOOLSETS["all"], SandboxConfig(), SearchConfig(path=index_folder(str(tmp_path)), passages=2), PROMPT)
    style = style_of("all")
    assert real.schemas(SETTINGS, PROMPT) == style.tools.schemas(SETTINGS, PROMPT)
    assert GIVEN[1] == 84 * 84 and SETTINGS.most_pixels >= SETTINGS.high_pixels


def test_the_search_of_the_corpus_finds_what_an_index_finds_first(tmp_path):
    rng = np.random.default_rng(4)
    written = write_articles(rng, draw_names(rng, 8, base=True))
    search_index.build([(a.id, a.title, a.text) for a in written], tmp_path / "index")
    index, own = Index(str(tmp_path / "index")), search_in(written)
    for article in written:
        assert index.search(article.title, 1)[0].text == article.text == own.function(None, article.title)[0]
    assert own.function(None, "Zzzzzz") == ["No passages were found."]


def test_the_python_of_the_corpus_shows_images_with_their_origin():
    from imagent_jax.tiny.corpus import give

    shown = Shown(np.random.default_rng(5), "train", ("noise",))
    for steps in ([("turn", 90)], [("denoise", "")], [("shift", 42)]):
        _, registry = give([shown.pixels], style_of("code"))
        result = style_of("code").tools.execute(
            QWEN.parse_call(QWEN.render_call("python", {"code": program(1, steps)})), registry, SETTINGS
        )
        assert result.parts == ["Image 2: python of Image 1", 2] and registry[2].shown == (84, 84)
        assert np.array_equal(np.asarray(registry[2].pixels), run(shown.pixels, steps))
    assert python.name == "python"


def answered(question: str, lines: list[str]) -> tuple[str, list[str]]:
    """The answer of a question, and the readings that it needs, found in `lines` by reading them word for word."""
    read = {int(n): (colour, int(digit)) for n, colour, digit in re.findall(r"Image (\d) (\w+) (\d)\.", "\n".join(lines))}
    line = lambda n: f"Image {n} {read[n][0]} {read[n][1]}."  # noqa: E731
    named = [(colour, int(n)) for colour, n in re.findall(r"the (\w+) tag in Image (\d)", question)]
    if question.startswith("Name"):
        chain, kind, called = re.fullmatch(r"Name the (.*) of the (ship|star|person|place) (.*)\.", question).groups()
        marks = dict(re.findall(r"(Image \d) (\w+\d \w+\d)\.", "\n".join(lines)))
        key = f"mark {marks[called.removeprefix('with the mark in ')]}," if called.startswith("with") else f"{kind} {called}:"
        for relation in reversed(chain.split(" of the ")):
            (article,) = {one for one in lines if one.startswith(kind) and key in one}
            name = re.search(rf"{relation} (\w+)", article)[1]
            kind = next(kinds[relation] for kinds in RELATIONS.values() if relation in kinds)
            key = f"{kind} {name}:"
        return name, []
    if question.startswith("In which"):
        colour = re.search(r"the (\w+) tag", question)[1]
        (found,) = [n for n, (one, digit) in read.items() if one == colour and digit > 4]
        alike = [n for n, (one, _) in read.items() if one == colour]
        return f"Image {found}", [line(n) for n in alike[: alike.index(found) + 1]]
    if question.startswith("Which"):
        numbers = [int(n) for n in re.findall(r"Image (\d)", question)]
        return f"Image {max(numbers, key=lambda n: read[n][1])}", [line(n) for n in numbers]
    assert all(read[n][0] == colour for colour, n in named)
    return str(sum(read[n][1] for _, n in named)), [line(n) for _, n in named]


def test_what_is_told_answers_the_question():
    rng, seen = np.random.default_rng(9), Counter()
    for _ in range(160):
        for ((question, text),) in ([*turns(one)] for one in make_group(rng, 6, "told").responses):
            before, lines = (part.strip("\n").split("\n") for part in question.split("Read this."))
            asked = before[0] or lines.pop()
            answer, evidence = answered(asked, lines)
            assert text == "".join(f"{one}\n" for one in evidence) + f"<answer>{answer}</answer><|im_end|>"
            seen[asked.split()[0], bool(before[0])] += 1
            seen["mark"] += "with the mark" in asked
            seen["two hops"] += asked.count(" of the ") == 2 and asked.startswith("Name")
    assert all(seen[word, first] > 5 for word in ("Read", "What", "Add", "Which", "In", "Name") for first in (True, False))
    assert seen["mark"] > 20 and seen["two hops"] > 60


# ---- forms and tokens -----------------------------------------------------------------------------------------------------


def test_forms_have_shares_shapes_and_the_tools_they_need():
    for forms in (FORMS, FIRST_FORMS):
        assert sum(forms.values()) == pytest.approx(1) and set(forms) == set(TOOL_SHAPES) == set(corpus_tools.KEYS)
    for forms in LATER_FORMS.values():
        assert sum(forms.values()) == pytest.approx(1) and set(forms) < set(FORMS)
    rng = np.random.default_rng(6)
    for form, key in corpus_tools.KEYS.items():
        prompts = [make_group(rng, 2, form).prompt for _ in range(12)]
        names = {tuple(re.findall(r'"name": "(\w+)", "desc', prompt)) for prompt in prompts}
        assert names == {TOOLSETS[key], TOOLSETS["all"]}


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> Processor:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(folder, corpus_texts(1500, 0), 1408, NAMED_VALUES)
    return Processor.from_pretrained(folder)


@pytest.mark.slow(15)
def test_shapes_hold_the_groups_of_the_tool_corpus(processor):
    rng = np.random.default_rng(7)
    for form, shapes in TOOL_SHAPES.items():
        assert [s.width for s in shapes] == sorted(s.width for s in shapes)
        for _ in range(5):
            prompt, responses = encode_group(make_group(rng, shapes[0].size, form), processor)
            longest = max(sum(len(one.ids) for one, _ in response) for response in responses)
            assert len(prompt.ids) <= shapes[-1].prompt and longest <= shapes[-1].width, form


def test_names_marks_and_words_of_articles_are_the_same_tokens_everywhere(processor):
    encode = lambda text: processor.tokenizer.convert_ids_to_tokens(processor.encode(text))  # noqa: E731
    assert encode("Bakelo") == ["Ba", "ke", "lo"]
    for text in ("the ship Bakelo.", '{"query": "ship Bakelo"}', "ship Bakelo: mark red7 blue3, captain Tovira."):
        tokens = encode(text)
        assert "ship" in [t.strip() for t in tokens] and tokens[tokens.index("Ba") :][:3] == ["Ba", "ke", "lo"]
    tokens = encode("mark red7 blue3, captain Tovira")
    assert [t for t in tokens if t in ("red", "7", "blue", "3", "captain", "To", "vi", "ra")] == [
        "red", "7", "blue", "3", "captain", "To", "vi", "ra",
    ]  # fmt: skip
    assert "Se" not in encode("Search for")  # no name
    for words in (*RELATIONS, *TURNS):
        assert processor.tokenizer.decode(processor.encode(words)) == words


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_a_step_is_said_to_compute_is_what_its_code_computes(name):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 40, 3), np.uint8)
    pixels[rng.random((40, 40)) < 0.6] = 255 * rng.integers(0, 2)
    for argument in OPERATIONS[name].arguments:
        made, steps = [], [("turn", 90), (name, argument)]
        scope = {"images": {1: Image.fromarray(pixels)}, "show": lambda image, parent=None, made=made: made.append(image)}
        exec(program(1, steps), scope)
        assert np.array_equal(run(pixels, steps), np.asarray(made[0]))
