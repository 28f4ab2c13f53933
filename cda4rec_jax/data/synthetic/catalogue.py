"""Items of the synthetic world: shelves, brands, styles, titles, attraction, launch dates and complements."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64

from cda4rec_jax.data.synthetic.config import SyntheticConfig

START_SECONDS = 1_672_531_200.0  # 2023-01-01 UTC
DAY_SECONDS = 86_400.0
YEAR_DAYS = 365.0
NUM_STYLES = 4
BRANDS_PER_DEPARTMENT = 5

# Department -> shelves in the order of complements (whoever bought from a shelf looks at the next one, and the last leads to the
# first) -> what stands on the shelf.
DEPARTMENTS: dict[str, dict[str, tuple[str, ...]]] = {
    "Photo": {
        "Cameras": ("Mirrorless Camera", "Reflex Camera", "Instant Camera"),
        "Lenses": ("Prime Lens", "Zoom Lens", "Macro Lens"),
        "Tripods": ("Travel Tripod", "Monopod", "Ball Head"),
        "Camera Bags": ("Sling Bag", "Camera Backpack", "Lens Pouch"),
    },
    "Audio": {
        "Turntables": ("Turntable", "Record Player", "Phono Stage"),
        "Speakers": ("Bookshelf Speaker", "Floor Speaker", "Soundbar"),
        "Headphones": ("Over-Ear Headphones", "Earbuds", "Studio Headphones"),
        "Audio Cables": ("Speaker Cable", "Optical Cable", "Headphone Extension"),
    },
    "Kitchen": {
        "Kettles": ("Gooseneck Kettle", "Electric Kettle", "Stovetop Kettle"),
        "Tea": ("Green Tea", "Black Tea", "Herbal Infusion"),
        "Mugs": ("Stoneware Mug", "Travel Mug", "Glass Cup"),
        "Baking": ("Loaf Tin", "Cake Mould", "Mixing Bowl"),
    },
    "Cycling": {
        "Bicycles": ("Road Bike", "Gravel Bike", "City Bike"),
        "Helmets": ("Road Helmet", "Urban Helmet", "Trail Helmet"),
        "Bike Lights": ("Headlight", "Rear Light", "Dynamo Light"),
        "Locks": ("Folding Lock", "Chain Lock", "U-Lock"),
    },
    "Garden": {
        "Seeds": ("Tomato Seeds", "Wildflower Seeds", "Herb Seeds"),
        "Planters": ("Terracotta Planter", "Raised Bed", "Window Box"),
        "Watering": ("Watering Can", "Garden Hose", "Drip Kit"),
        "Hand Tools": ("Pruning Shears", "Trowel", "Weeding Fork"),
    },
    "Beauty": {
        "Cleansers": ("Gel Cleanser", "Cleansing Balm", "Micellar Water"),
        "Serums": ("Vitamin Serum", "Night Serum", "Peptide Serum"),
        "Moisturisers": ("Day Cream", "Night Cream", "Face Oil"),
        "Sun Care": ("Sunscreen Fluid", "Sun Stick", "After-Sun Gel"),
    },
    "Gaming": {
        "Consoles": ("Home Console", "Handheld Console", "Retro Console"),
        "Controllers": ("Wireless Controller", "Arcade Stick", "Racing Wheel"),
        "Games": ("Puzzle Game", "Racing Game", "Adventure Game"),
        "Headsets": ("Wired Headset", "Wireless Headset", "Streaming Microphone"),
    },
    "Camping": {
        "Tents": ("Dome Tent", "Tunnel Tent", "Bivouac"),
        "Sleeping": ("Sleeping Bag", "Sleeping Mat", "Camp Pillow"),
        "Stoves": ("Gas Stove", "Wood Stove", "Cook Set"),
        "Lanterns": ("Head Torch", "Camp Lantern", "Solar Light"),
    },
}
SHELVES = tuple((department, shelf) for department, shelves in DEPARTMENTS.items() for shelf in shelves)
SHELVES_PER_DEPARTMENT = 4
NUM_SHELVES = len(SHELVES)

# Words for the strongest style of an item, at its negative and at its positive end: text tells style.
_ADJECTIVES = (
    (("Classic", "Vintage", "Heritage"), ("Modern", "Smart", "Digital")),
    (("Budget", "Basic", "Everyday"), ("Premium", "Luxury", "Signature")),
    (("Compact", "Slim", "Light"), ("Large", "Heavy-Duty", "Pro")),
    (("Plain", "Quiet", "Grey"), ("Colourful", "Bold", "Neon")),
)
_BRAND_STARTS = ("Nor", "Vel", "Kas", "Lum", "Tri", "Oro", "Zen", "Mira", "Bel", "Dax", "Fen", "Hal")
_BRAND_ENDS = ("vik", "ton", "ora", "exa", "ina", "mark", "elle", "io")


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """Items by item_index; row 0 is padding (shelf -1, no attraction, no successors)."""

    titles: tuple[str, ...]  # of items 1, 2, ...
    categories: tuple[tuple[str, ...], ...]  # (department, shelf) of items 1, 2, ...
    shelves: Int64[np.ndarray, "i"]
    styles: Float64[np.ndarray, "i styles"]
    attraction: Float64[np.ndarray, "i"]  # sums to 1
    launch_seconds: Float64[np.ndarray, "i"]  # unix; 0 for items that were always there
    retire_seconds: Float64[np.ndarray, "i"]  # unix; infinite for items that stay
    successors: Int64[np.ndarray, "i successors"]  # complements on the next shelf, strongest first; 0 is none
    successor_shares: Float64[np.ndarray, "i successors"]  # sum to 1

    def closed_at(self, timestamps: Float64[np.ndarray, "b"]) -> Bool[np.ndarray, "b i"]:
        """Items that are not on offer at each time: not launched yet, or retired."""
        return (self.launch_seconds[None, :] > timestamps[:, None]) | (self.retire_seconds[None, :] <= timestamps[:, None])


def make_catalogue(config: SyntheticConfig, rng: np.random.Generator, retirement_rng: np.random.Generator) -> Catalogue:
    """Draws the items, and apart from all else which of them retire.

    Index and id of an item say nothing about its shelf, attraction or age.
    """
    num_rows = config.num_items + 1
    shelves = np.full(num_rows, -1, np.int64)
    shelves[1:] = rng.permutation(np.arange(config.num_items) % NUM_SHELVES)
    brands = rng.integers(BRANDS_PER_DEPARTMENT, size=num_rows) + shelves // SHELVES_PER_DEPARTMENT * BRANDS_PER_DEPARTMENT
    brand_styles = rng.normal(size=(len(DEPARTMENTS) * BRANDS_PER_DEPARTMENT, NUM_STYLES))
    styles = 0.7 * brand_styles[brands] + 0.7 * rng.normal(size=(num_rows, NUM_STYLES))
    attraction = np.zeros(num_rows)
    attraction[1:] = rng.permutation(np.arange(1, num_rows) ** -config.popularity_exponent)
    launch_seconds = np.zeros(num_rows)
    late = rng.permutation(np.arange(1, num_rows))[: int(config.launched_late * config.num_items)]
    launch_seconds[late] = START_SECONDS + DAY_SECONDS * rng.uniform(0, YEAR_DAYS, size=len(late))
    retire_seconds = np.full(num_rows, np.inf)
    always = retirement_rng.permutation(np.setdiff1d(np.arange(1, num_rows), late))[: int(config.retired * config.num_items)]
    retire_seconds[always] = START_SECONDS + DAY_SECONDS * retirement_rng.uniform(0, YEAR_DAYS, size=len(always))
    successors, shares = _complements(config.num_successors, shelves, brands, rng)
    return Catalogue(
        titles=_titles(shelves[1:], brands[1:], styles[1:], rng),
        categories=tuple(SHELVES[shelf] for shelf in shelves[1:]),
        shelves=shelves,
        styles=styles,
        attraction=attraction / attraction.sum(),
        launch_seconds=launch_seconds,
        retire_seconds=retire_seconds,
        successors=successors,
        successor_shares=shares,
    )


def next_shelf(shelves: Int64[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
    """The shelf whose items complement those of each given shelf: directed, within the department."""
    department, place = np.divmod(shelves, SHELVES_PER_DEPARTMENT)
    return department * SHELVES_PER_DEPARTMENT + (place + 1) % SHELVES_PER_DEPARTMENT


def _complements(
    num_successors: int, shelves: np.ndarray, brands: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Successors of each item on the next shelf, those of its own brand first, with shares 1, 1/2, 1/3, ... (normalised)."""
    successors = np.zeros((len(shelves), num_successors), np.int64)
    shares = np.zeros((len(shelves), num_successors))
    targets = next_shelf(shelves)
    for item in range(1, len(shelves)):
        others = rng.permutation(np.flatnonzero(shelves == targets[item]))
        chosen = others[np.argsort(brands[others] != brands[item], kind="stable")][:num_successors]
        weights = 1 / np.arange(1, len(chosen) + 1)
        successors[item, : len(chosen)] = chosen
        shares[item, : len(chosen)] = weights / weights.sum()
    return successors, shares


def _titles(shelves: np.ndarray, brands: np.ndarray, styles: np.ndarray, rng: np.random.Generator) -> tuple[str, ...]:
    """Unique titles: brand, adjective of the strongest style, noun of the shelf, and a model number."""
    names = [start + end for start in _BRAND_STARTS for end in _BRAND_ENDS]
    brand_names = [names[index] for index in rng.permutation(len(names))]
    titles: list[str] = []
    for index, (shelf, brand, style) in enumerate(zip(shelves, brands, styles, strict=True)):
        department, shelf_name = SHELVES[shelf]
        strongest = int(np.abs(style).argmax())
        adjective = rng.choice(_ADJECTIVES[strongest][int(style[strongest] > 0)])
        noun = rng.choice(DEPARTMENTS[department][shelf_name])
        titles.append(f"{brand_names[brand]} {adjective} {noun} {100 + index}")
    return tuple(titles)
