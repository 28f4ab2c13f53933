"""Reading folders: what a clean one becomes, and that a bad one is refused with everything that is wrong in it."""

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cda4rec_jax.data import read_interactions, read_source
from cda4rec_jax.data.formats import tables
from cda4rec_jax.data.formats.movielens import GENRES_100K
from cda4rec_jax.errors import UserError

INTER = "user_id:token\titem_id:token\ttimestamp:float\n"
EVENTS = "u1\ta\t30\nu2\tb\t5\nu1\tb\t10\nu2\tc\t6\nu1\tc\t20\nu2\ta\t6\n"


@pytest.fixture
def recbole(tmp_path: Path) -> Callable[..., str]:
    """Writes a RecBole folder from the texts of its files and gives its path."""

    def write(inter: str | bytes, item: str | None = None, user: str | None = None) -> str:
        folder = tmp_path / "shop"
        folder.mkdir(exist_ok=True)
        for suffix, content in (("inter", inter), ("item", item), ("user", user)):
            if content is not None:
                (folder / f"shop.{suffix}").write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(folder)

    return write


def taken(source: str) -> dict[str, list[str]]:
    data = read_interactions(source)
    return {user: [data.item_ids[item - 1] for item in data.history(j)] for j, user in enumerate(data.user_ids)}


def refusal(source: str) -> str:
    with pytest.raises(UserError) as caught:
        read_interactions(source)
    return str(caught.value)


def test_events_are_chronological_per_user_and_ties_keep_the_order_of_the_file(recbole: Callable[..., str]) -> None:
    source = recbole(INTER + EVENTS)
    assert taken(source) == {"u1": ["b", "c", "a"], "u2": ["b", "c", "a"]}
    data = read_interactions(source)
    assert data.name == "shop"
    assert data.timestamps.tolist() == [10, 20, 30, 5, 6, 6]
    assert data.has_timestamps


def test_timestamps_that_only_count_are_known_as_an_order(recbole: Callable[..., str]) -> None:
    counting = "u1\ta\t0\nu1\tb\t1\nu1\tc\t2\nu2\ta\t0\nu2\tb\t1\nu2\tc\t2\n"
    assert not read_interactions(recbole(INTER + counting)).has_timestamps
    assert read_interactions(recbole(INTER + counting + "u2\td\t4\n")).has_timestamps


def test_texts_and_attributes_join_by_id_and_gaps_are_reported(recbole: Callable[..., str]) -> None:
    item = "item_id:token\ttitle:token_seq\tcategories:token_seq\na\tApple\tFood | Fruit\nc\tCocoa\t\nz\tZebra\tZoo\na\tAgain\t\n"
    user = "user_id:token\tgender:token\tage:float\nu2\tF\t25\nu9\tM\t30\n"
    reading = read_source(recbole(INTER + EVENTS, item, user))
    data = reading.interactions
    titles = dict(zip(data.item_ids, data.titles, strict=True))
    assert titles == {"a": "Apple", "b": "", "c": "Cocoa"}
    assert data.categories[data.item_ids.index("a")] == ("Food", "Fruit")
    assert data.user_attributes == {"gender": ("", "F"), "age": ("", "25")}
    assert [finding.line() for finding in reading.findings] == [
        "dropped 1 items: described again in shop.item: the first description holds (a)",
        "dropped 1 items: in the item file, but without an interaction (z)",
        "dropped 1 users: in the user file, but without an interaction (u9)",
        "kept 1 items: without a title: the title is empty (b)",
    ]
    assert reading.found.items == 4


def test_recbole_own_column_names_are_known(recbole: Callable[..., str]) -> None:
    item = "item_id:token\tmovie_title:token_seq\tclass:token_seq\na\tAlien\tHorror Sci-Fi\n"
    data = read_interactions(recbole(INTER + EVENTS, item))
    assert data.titles[data.item_ids.index("a")] == "Alien"
    assert data.categories[data.item_ids.index("a")] == ("Horror", "Sci-Fi")


def test_short_users_and_items_only_they_took_are_dropped_and_repeats_are_kept(recbole: Callable[..., str]) -> None:
    reading = read_source(recbole(INTER + EVENTS + "u3\tlonely\t1\nu1\ta\t40\n"))
    assert reading.interactions.num_users == 2
    assert "lonely" not in reading.interactions.item_ids
    lines = [finding.line() for finding in reading.findings]
    assert "dropped 1 users: fewer than 3 events (u3)" in lines
    assert "dropped 1 items: only users with fewer than 3 events took them (lonely)" in lines
    assert "kept 1 interactions: repeats of an item that the user had before" in lines


def test_item_order_follows_neither_first_appearance_nor_ids(recbole: Callable[..., str]) -> None:
    names = [f"i{j:03}" for j in range(50)]
    rows = "".join(f"{user}\t{name}\t{j}\n" for user in ("u1", "u2") for j, name in enumerate(names))
    read = list(read_interactions(recbole(INTER + rows)).item_ids)
    assert sorted(read) == names
    assert read not in (names, names[::-1])
    assert list(read_interactions(recbole(INTER + "".join(reversed(rows.splitlines(keepends=True))))).item_ids) == read


def test_windows_line_ends_marks_and_blank_lines_at_the_end_are_harmless(recbole: Callable[..., str]) -> None:
    written = "\ufeff" + (INTER + EVENTS).replace("\n", "\r\n") + "\r\n\r\n"
    assert taken(recbole(written)) == {"u1": ["b", "c", "a"], "u2": ["b", "c", "a"]}


def test_all_problems_of_all_files_come_in_one_error(recbole: Callable[..., str]) -> None:
    bad = "u1\ta\nu1\tb\tnan\nu1\t\t3\n\nu1\tb\tsoon\nu1\tb\tinf\nu2\ta\t1\t2\nu2\ta\n"
    message = refusal(recbole(INTER + EVENTS + bad, "item:token\ttitle:token_seq\na\tApple\n", "user_id:token\tage:float\nu1\n"))
    assert "shop.inter, line 8: expected 3 fields separated by tab, found 2: b'u1\\ta'" in message
    assert "shop.inter, line 9: timestamp must be a finite number, found 'nan'" in message
    assert "shop.inter, line 10: item_id is empty" in message
    assert "shop.inter, line 11: expected 3 fields separated by tab, found 1" in message
    assert "shop.inter, line 12: timestamp must be a finite number, found 'soon'" in message
    assert "shop.inter: 3 more bad lines" in message
    assert "shop.item: missing column item_id; expected item_id, found item, title" in message
    assert "shop.user, line 2: expected 2 fields, found 1" in message


def test_a_bad_line_is_named_by_its_number_in_any_block(recbole: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "BLOCK_BYTES", 64)
    rows = [f"u{j % 7}\ti{j % 11}\t{j}\n" for j in range(500)]
    assert len(read_interactions(recbole(INTER + "".join(rows))).items) == 500
    rows[400] = rows[400].replace("\t", " ", 1)
    message = refusal(recbole(INTER + "".join(rows)))
    assert "line 402: expected 3 fields" in message
    assert message.count("line ") == 1


@pytest.mark.parametrize(
    ("inter", "expected"),
    [
        (b"", "missing column user_id, item_id, timestamp; expected user_id, item_id, timestamp, found an empty header"),
        (INTER, "the file is empty, expected one interaction a line"),
        (
            "user_id:token\titem_id:token\trating:float\nu1\ta\t3\n",
            "missing column timestamp; expected user_id, item_id, timestamp",
        ),
        ("user_id:token\tuser_id:token\titem_id:token\ttimestamp:float\n", "column user_id occurs more than once"),
        (INTER + "u1\ta\t1\nu1\tb\t2\nu1\tc\t3\n", "all interactions are of one user"),
        (INTER + "u1\ta\t1\nu2\tb\t2\nu2\tc\t3\n", "0 of 2 users have 3 or more events"),
        ((INTER + EVENTS).encode() + b"u1\t\xff\t3\n", "shop.inter, line 8: not utf-8 text: byte 0xff"),
    ],
)
def test_unusable_interactions_are_refused(recbole: Callable[..., str], inter: str | bytes, expected: str) -> None:
    assert expected in refusal(recbole(inter))


@pytest.mark.parametrize(
    ("inter", "expected"),
    [
        ("user_id:token,item_id:token,timestamp:float\nu1,a,3\n", "found user_id: are its columns separated by tab?"),
        (EVENTS, "found u1, a, 30: the first line must name the columns"),
        ("user_id\titem_id\nu1\ta\n", "number them 0, 1, 2, ..."),
        ((INTER + EVENTS).encode("utf-16"), "line 1: not utf-8 text: byte 0xff; save the file as utf-8"),
        (gzip.compress(INTER.encode(), mtime=0), "line 1: not utf-8 text: byte 0x8b; save the file as utf-8, and not compressed"),
        ("\t".join(f"\x1b[3{column % 8}m{column}" for column in range(99)), "found \\x1b[30m0, \\x1b[31m1, "),
    ],
)
def test_a_header_that_is_none_is_told_with_what_it_probably_is(
    recbole: Callable[..., str], inter: str | bytes, expected: str
) -> None:
    message = refusal(recbole(inter))
    assert expected in message
    assert len(message) < 600 and "\x1b" not in message


@pytest.mark.parametrize(("name", "unit"), [("milliseconds", 1e-3), ("microseconds", 1e-6), ("nanoseconds", 1e-9)])
def test_timestamps_of_smaller_units_become_seconds(recbole: Callable[..., str], name: str, unit: float) -> None:
    rows = "".join(f"u{user}\ti{event}\t{(1.7e9 + 3600 * event) / unit:.0f}\n" for user in range(3) for event in range(4))
    reading = read_source(recbole(INTER + rows))
    assert [finding.line() for finding in reading.findings][
        1
    ] == f"converted 12 timestamps: they count {name}, and are kept in seconds"
    np.testing.assert_allclose(reading.interactions.timestamps[:4], 1.7e9 + 3600 * np.arange(4), atol=1e-3)


def test_two_tables_in_one_folder_are_refused(recbole: Callable[..., str]) -> None:
    source = recbole(INTER + EVENTS)
    (Path(source) / "other.inter").write_text(INTER)
    assert "expected one .inter file, found other.inter, shop.inter" in refusal(source)


def test_movielens_dat_folders_are_read_with_their_encoding(tmp_path: Path) -> None:
    (tmp_path / "ratings.dat").write_text("1::10::5::30\n2::20::1::5\n1::20::3::10\n2::10::4::6\n1::30::3::20\n2::30::2::7\n")
    (tmp_path / "movies.dat").write_bytes(
        "10::Misérables, Les (1995)::Drama|Musical\n20::Heat (1995)::Action\n".encode("latin-1")
    )
    (tmp_path / "users.dat").write_text("1::F::1::10::48067\n2::M::56::16::70072\n")
    data = read_interactions(str(tmp_path))
    assert taken(str(tmp_path)) == {"1": ["20", "30", "10"], "2": ["20", "10", "30"]}
    assert data.titles[data.item_ids.index("10")] == "Misérables, Les (1995)"
    assert data.categories[data.item_ids.index("10")] == ("Drama", "Musical")
    assert data.user_attributes["occupation"] == ("10", "16")
    (tmp_path / "ratings.dat").write_text("1::10::5::30\n1::10::5\n")
    assert "ratings.dat, line 2: expected 4 fields separated by '::', found 3" in refusal(str(tmp_path))


def test_the_first_movielens_is_read_with_a_column_for_each_genre(tmp_path: Path) -> None:
    (tmp_path / "u.data").write_text("1\t10\t5\t30\n2\t20\t1\t5\n1\t20\t3\t10\n2\t10\t4\t6\n1\t30\t3\t20\n2\t30\t2\t7\n")
    flags = dict.fromkeys(GENRES_100K, "0")
    drama, none = "|".join((flags | {"Drama": "1", "Western": "1"}).values()), "|".join(flags.values())
    films = f"10|Misérables, Les (1995)|01-Jan-1995||http://us.imdb.com/a|0|{drama}\n20|unknown||||1|{none}\n"
    (tmp_path / "u.item").write_bytes(films.encode("latin-1"))
    (tmp_path / "u.user").write_text("1|24|F|technician|85711\n2|53|M|other|94043\n")
    data = read_interactions(str(tmp_path))
    assert taken(str(tmp_path)) == {"1": ["20", "30", "10"], "2": ["20", "10", "30"]}
    assert data.titles[data.item_ids.index("10")] == "Misérables, Les (1995)"
    assert data.categories[data.item_ids.index("10")] == ("Drama", "Western")
    assert data.categories[data.item_ids.index("20")] == ()
    assert data.user_attributes["gender"] == ("F", "M") and data.user_attributes["age"] == ("24", "53")
    (tmp_path / "u.item").write_text("10|Heat (1995)|Drama\n")
    assert "u.item, line 1: expected 24 fields, found 3" in refusal(str(tmp_path))


def test_movielens_csv_folders_are_read_with_quoted_titles(tmp_path: Path) -> None:
    ratings = "userId,movieId,rating,timestamp\n1,10,4.0,30\n1,20,4.0,10\n1,30,4.5,20\n2,10,1.0,1\n2,20,1.0,2\n2,30,1.0,3\n"
    (tmp_path / "ratings.csv").write_text(ratings)
    (tmp_path / "movies.csv").write_text(
        'movieId,title,genres\n10,"American President, The (1995)",Comedy|Drama\n20,Heat (1995),(no genres listed)\n'
    )
    data = read_interactions(str(tmp_path))
    assert taken(str(tmp_path))["1"] == ["20", "30", "10"]
    assert data.titles[data.item_ids.index("10")] == "American President, The (1995)"
    assert data.categories[data.item_ids.index("20")] == ()
    (tmp_path / "movies.csv").write_text("movieId,title,genres\n10,American President, The (1995),Comedy\n")
    assert "movies.csv, line 2: expected 3 fields, found 4" in refusal(str(tmp_path))
    many = "".join(f"{number},Film {number},Comedy\n" for number in range(40, 9000))
    (tmp_path / "movies.csv").write_text(f'movieId,title,genres\n10,Heat,Drama\n20,"Heat,Drama\n{many}')
    assert "movies.csv, line 3: field larger than field limit (131072): is there a quote that is not closed?" in refusal(
        str(tmp_path)
    )


@pytest.mark.parametrize("name", ["ml-1m", "amazon-beauty"])
def test_benchmark_datasets_have_their_published_sizes(data_folder: Path, name: str) -> None:
    if not (data_folder / name).is_dir():
        pytest.skip(f"no {name} in {data_folder}")
    reading = read_source(str(data_folder / name))
    sizes = {"ml-1m": (6040, 3416, 999_611), "amazon-beauty": (22_363, 12_101, 198_502)}
    data = reading.interactions
    assert (data.num_users, data.num_items, data.num_interactions) == sizes[name]
    assert not data.has_timestamps
    assert reading.findings == ()
