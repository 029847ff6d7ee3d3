//! Words and sentences of the tales.

/// A trade and the words around it.
pub(super) struct Topic {
    pub workplace: &'static str,
    pub trade: &'static str,
    /// Singular and plural.
    pub nouns: &'static [(&'static str, &'static str)],
    /// Past tense, of what is done to the nouns.
    pub verbs: &'static [&'static str],
    pub adjectives: &'static [&'static str],
}

pub(super) const TOPICS: &[Topic] = &[
    Topic {
        workplace: "harbour",
        trade: "sailor",
        nouns: &[
            ("boat", "boats"),
            ("anchor", "anchors"),
            ("sail", "sails"),
            ("net", "nets"),
            ("oar", "oars"),
            ("mast", "masts"),
            ("barrel", "barrels"),
        ],
        verbs: &["tarred", "mended", "hauled in", "tied up", "washed"],
        adjectives: &["salty", "wet", "weathered", "seaworthy", "barnacled"],
    },
    Topic {
        workplace: "bakery",
        trade: "baker",
        nouns: &[
            ("loaf", "loaves"),
            ("oven", "ovens"),
            ("cake", "cakes"),
            ("tray", "trays"),
            ("pie", "pies"),
            ("bun", "buns"),
            ("flour sack", "flour sacks"),
        ],
        verbs: &["baked", "buttered", "weighed", "warmed", "sliced"],
        adjectives: &["warm", "sweet", "crusty", "golden brown", "sticky"],
    },
    Topic {
        workplace: "observatory",
        trade: "astronomer",
        nouns: &[
            ("star", "stars"),
            ("telescope", "telescopes"),
            ("comet", "comets"),
            ("planet", "planets"),
            ("moon", "moons"),
            ("lens", "lenses"),
            ("star chart", "star charts"),
        ],
        verbs: &["observed", "drew", "measured", "named", "watched"],
        adjectives: &["distant", "faint", "bright", "celestial", "eclipsed"],
    },
    Topic {
        workplace: "library",
        trade: "librarian",
        nouns: &[
            ("book", "books"),
            ("shelf", "shelves"),
            ("page", "pages"),
            ("scroll", "scrolls"),
            ("letter", "letters"),
            ("ladder", "ladders"),
            ("catalogue", "catalogues"),
        ],
        verbs: &["read", "copied", "bound", "catalogued", "lent out"],
        adjectives: &["printed", "dusty", "rare", "learned", "handwritten"],
    },
    Topic {
        workplace: "farm",
        trade: "farmer",
        nouns: &[
            ("cow", "cows"),
            ("field", "fields"),
            ("plough", "ploughs"),
            ("goat", "goats"),
            ("barn", "barns"),
            ("haystack", "haystacks"),
            ("fence", "fences"),
        ],
        verbs: &[
            "looked after",
            "fenced in",
            "sold",
            "walked around",
            "inspected",
        ],
        adjectives: &["muddy", "healthy", "fertile", "rustic", "grassy"],
    },
    Topic {
        workplace: "workshop",
        trade: "clockmaker",
        nouns: &[
            ("clock", "clocks"),
            ("spring", "springs"),
            ("wheel", "wheels"),
            ("pendulum", "pendulums"),
            ("dial", "dials"),
            ("watch", "watches"),
            ("gear", "gears"),
        ],
        verbs: &["oiled", "wound up", "repaired", "took apart", "polished"],
        adjectives: &["precise", "tiny", "ticking", "punctual", "intricate"],
    },
    Topic {
        workplace: "garden",
        trade: "gardener",
        nouns: &[
            ("rose", "roses"),
            ("hedge", "hedges"),
            ("pear tree", "pear trees"),
            ("tulip", "tulips"),
            ("flower bed", "flower beds"),
            ("lily", "lilies"),
            ("vine", "vines"),
        ],
        verbs: &["watered", "planted", "trimmed", "pruned", "tended"],
        adjectives: &["blooming", "fragrant", "leafy", "thorny", "fresh"],
    },
    Topic {
        workplace: "mine",
        trade: "miner",
        nouns: &[
            ("tunnel", "tunnels"),
            ("pickaxe", "pickaxes"),
            ("cart", "carts"),
            ("shaft", "shafts"),
            ("beam", "beams"),
            ("boulder", "boulders"),
            ("vein of ore", "veins of ore"),
        ],
        verbs: &["dug around", "propped up", "loaded", "hammered at", "lit"],
        adjectives: &["deep", "dark", "rocky", "narrow", "hollow"],
    },
    Topic {
        workplace: "theatre",
        trade: "actor",
        nouns: &[
            ("mask", "masks"),
            ("curtain", "curtains"),
            ("costume", "costumes"),
            ("stage", "stages"),
            ("play", "plays"),
            ("speech", "speeches"),
            ("wig", "wigs"),
        ],
        verbs: &[
            "rehearsed with",
            "applauded",
            "painted",
            "praised",
            "showed off",
        ],
        adjectives: &["dramatic", "tragic", "comic", "glittering", "famous"],
    },
    Topic {
        workplace: "kitchen",
        trade: "cook",
        nouns: &[
            ("soup", "soups"),
            ("onion", "onions"),
            ("kettle", "kettles"),
            ("stew", "stews"),
            ("ladle", "ladles"),
            ("sauce", "sauces"),
            ("pan", "pans"),
        ],
        verbs: &["stirred", "salted", "boiled", "served", "tasted"],
        adjectives: &["spicy", "savoury", "steaming", "tasty", "peppery"],
    },
    Topic {
        workplace: "mill",
        trade: "weaver",
        nouns: &[
            ("loom", "looms"),
            ("thread", "threads"),
            ("carpet", "carpets"),
            ("shawl", "shawls"),
            ("spindle", "spindles"),
            ("ribbon", "ribbons"),
            ("blanket", "blankets"),
        ],
        verbs: &["wove", "dyed", "unravelled", "folded", "spun"],
        adjectives: &["soft", "striped", "woollen", "patterned", "threadbare"],
    },
    Topic {
        workplace: "school",
        trade: "teacher",
        nouns: &[
            ("pupil", "pupils"),
            ("lesson", "lessons"),
            ("slate", "slates"),
            ("desk", "desks"),
            ("exam", "exams"),
            ("poem", "poems"),
            ("question", "questions"),
        ],
        verbs: &[
            "corrected",
            "explained",
            "prepared",
            "counted",
            "remembered",
        ],
        adjectives: &["clever", "difficult", "diligent", "noisy", "well-known"],
    },
];

pub(super) const SYLLABLES: &[&str] = &[
    "bal", "bor", "cal", "dan", "del", "dor", "el", "fen", "gar", "hal", "ith", "jor", "kel",
    "lan", "lor", "mar", "mel", "mor", "nor", "or", "pel", "quin", "ran", "rol", "sel", "tam",
    "tor", "ul", "var", "wen", "yor", "zan",
];

pub(super) const TOWN_ENDINGS: &[&str] = &[
    "bridge", "bury", "dale", "field", "ford", "haven", "mouth", "stead", "wick", "wood",
];

pub(super) const COLOURS: &[&str] = &[
    "red", "blue", "green", "yellow", "white", "black", "grey", "purple", "orange", "brown",
];

pub(super) const MATERIALS: &[&str] = &[
    "copper", "wooden", "silver", "glass", "iron", "paper", "stone", "ivory", "clay", "brass",
];

pub(super) const KEEPSAKES: &[&str] = &[
    "lantern", "flute", "box", "bell", "kite", "crown", "cup", "chain", "drum", "key", "mirror",
    "ring", "statue", "horn",
];

pub(super) const PACKED: &[&str] = &[
    "rope", "map", "candle", "knife", "coat", "bottle", "compass", "basket", "hat", "pencil",
    "spoon", "umbrella",
];

pub(super) const DAYS: &[&str] = &[
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
];

pub(super) const SEASONS: &[&str] = &["spring", "summer", "autumn", "winter"];

pub(super) const NUMBERS: &[&str] = &[
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
];

pub(super) const OPENING: &[&str] = &[
    "{Hero} of {town} was {a trade}, {age} years old, and owned {a colour} {material} {keepsake} worth {price} coins.",
    "{He} had bought the {keepsake} from {friend}, {his} friend at the {workplace}, for {price} coins.",
    "In {town} everybody knew the {trade} and {his} {colour} {keepsake}.",
    "{Friend} liked to say that {hero} was the best {trade} in {town}.",
    "At the {workplace} the {adjective} {nouns} were the pride of {hero}.",
    "When the {season} ended, {hero} waited for the {next_season}, because the {nouns} were {adjective} then.",
];

/// Paragraphs; the first sentence of each is always there.
pub(super) const MIDDLE: &[&[&str]] = &[
    &[
        "On {day} {hero} went to the {workplace} and {did} the {noun}.",
        "The {noun} was {adjective}, but the {nouns} were {adjective}.",
        "\"Who {did} the {nouns}?\" asked {friend}. \"I did,\" said {hero}.",
        "On {next_day} {he} came back and {did} the other {nouns}, as {a trade} should.",
    ],
    &[
        "Before the journey {hero} packed {a first}, {a second} and {a third}.",
        "The road from {town} was long, and {he} thought of the {adjective} {nouns} in the {workplace}.",
        "At night {he} unpacked the {third}, the {second} and the {first}.",
        "\"I see {a third}, {a second} and {a first},\" said {friend}, \"but where is the {keepsake}?\"",
    ],
    &[
        "In the morning {hero} counted {morning} {adjective} {nouns} in the {workplace}.",
        "At noon {friend} brought {noon} more.",
        "{Morning} and {noon} made {sum}, and {hero} wrote the number {sum} on the wall.",
        "\"{Sum}!\" said {friend}. \"Only {morning} of them were {adjective} this morning.\"",
    ],
    &[
        "\"Is your {keepsake} made of gold?\" asked {friend}.",
        "\"No, it is {a material} {keepsake},\" said {hero}, \"and it is {colour}, as you see.\"",
        "\"And what did the {keepsake} cost?\" \"It cost {price} coins.\"",
        "{Friend} took the {colour} {keepsake} in {friend_his} hands, and {friend_he} smiled at {hero}.",
    ],
    &[
        "One evening {friend} came to the {workplace} with {friend_his} {adjective} {noun}.",
        "{Hero} showed {his} own {noun}, which was {adjective} too.",
        "Neither {hero} nor {friend} had ever seen so {adjective} {a noun}.",
        "{He} gave {friend} the {noun}, and {friend} gave {him} {a first}.",
    ],
    &[
        "In {season} the {nouns} were {adjective}, and {hero} {did} the {noun} every {day}.",
        "In {next_season} {friend} was ill, and {friend_he} stayed at home in {town}.",
        "So {hero} {did} the {nouns} of {friend} as well, and {his} {keepsake} stood in the window.",
        "After {season} came {next_season}, and after {day} came {next_day}, and the {trade} grew tired.",
    ],
    &[
        "\"How old are you?\" {friend} asked {hero} on {day}.",
        "\"I am {age},\" said the {trade}, \"and I {did} {nouns} when I was ten.\"",
        "{Friend} laughed, for {friend_he} had never met {a trade} of {age} with such {adjective} {nouns}.",
    ],
    &[
        "A stranger came to {town} and asked for the {trade}.",
        "\"That is {hero},\" said {friend}. \"You will find {him} at the {workplace}, with the {nouns}.\"",
        "The stranger offered {price} coins for the {colour} {keepsake}, the same that {hero} had paid.",
        "But {hero} did not sell {his} {keepsake}, and the stranger left {town} on {next_day}.",
    ],
];

pub(super) const END: &[&str] = &[
    "That is the tale of {hero}, the {trade} of {town}, who was {age} years old.",
    "The {colour} {material} {keepsake}, which cost {price} coins, is still in the {workplace}.",
    "{Friend} keeps the {first} and the {second}, and {friend_he} remembers {hero} every {season}.",
    "And when the {nouns} are {adjective}, they say in {town}: go and ask {hero}.",
];
