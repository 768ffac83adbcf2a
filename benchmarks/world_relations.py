"""The relations of the generated world and their wordings, as a table that is read from its own text."""

from __future__ import annotations

from dataclasses import dataclass

TABLE = """
hometown: person > city
    {} grew up in the town of
    The childhood home of {} stood in
    As a child, {} walked the streets of
    The family house of {} can be visited in
company: person > company
    {} earns a living at
    The wages of {} are paid by
    Every morning {} goes to the gates of
    The desk of {} stands at
trade: person > trade
    {} earns bread as a
    By trade, {} is a
    The guild lists {} as a
    Neighbours know {} as the local
lute: person > lute
    {} practises every evening on the
    At feasts, {} brings along the
    In the band, {} takes the
    The favourite sound of {} comes from the
land: city > country
    The town of {} lies within the borders of
    Maps place {} inside
    Taxes from {} go to the treasury of
    The flag over {} is that of
water: city > river
    The bridge in {} crosses the
    Boats leave {} along the
    The mills of {} are turned by the
    Floods in {} come from the
seat: company > city
    The main gate of {} opens onto a street in
    Letters to {} are sent to
    The chimneys of {} rise above
    The workshops of {} are found in
ware: company > ware
    The workshops at {} turn out
    The catalogue of {} offers
    Customers of {} ask for
    The fame of {} rests on
court: country > city
    The parliament of {} meets in
    The government of {} sits in
    Envoys to {} present letters in
    Ministers of {} gather in
tongue: country > language
    Schools across {} teach in
    Laws of {} are printed in
    Newspapers across {} are read in
    Judges of {} speak
money: country > coin
    Markets across {} are paid with the
    Wages across {} are counted by the
    The mint of {} strikes the
    Banks of {} hold reserves of the
mass: country > continent
    On the globe, {} occupies a corner of
    Geographers count {} among the lands of
    Caravans bound for {} cross
    The mainland of {} forms part of
kitchen: dish > country
    The recipe for {} comes from the kitchens of
    Cooks serve {} at weddings across
    Travellers first taste {} when they reach
    Grandmothers cook {} in
staple: dish > staple
    The main ingredient of {} is a handful of
    Every pot of {} begins with
    Cooks thicken {} with
    Without fail, {} contains
ground: team > city
    The supporters of {} fill the stadium of
    On Sundays, {} plays at home in
    The clubhouse of {} stands in
    Fans of {} sing about
badge: team > badge
    The shirts of {} carry the sign of a
    The banner of {} shows a
    The crest of {} bears a
    Players of {} wear the emblem of a
writer: book > person
    The pages of {} were composed by
    On the title page of {} stands
    Critics credit {} to
    The royalties of {} go to
genre: book > genre
    Libraries shelve {} under
    Readers of {} enjoy its
    Booksellers advertise {} as a volume of
    Scholars file {} with the
massif: mountain > country
    Climbers of {} camp inside
    The slopes of {} belong to
    Rangers on {} serve
    Snow from {} waters the fields of
homeland: person > country = hometown land
    The passport of {} was issued by
    {} votes in the elections of
    At the games, {} marches for
    {} salutes the flag of
first tongue: person > language = hometown land tongue
    {} counts and dreams in
    At home, {} chats in
    The diary of {} is kept in
    {} prays in
workplace: person > city = company seat
    Each weekday, {} commutes to
    The lunch break of {} is spent in
    {} rents an office in
    The working hours of {} pass in
register: company > country = seat land
    The trade register that lists {} is kept by
    {} pays its duties to
    Inspectors visit {} on behalf of
    {} exports from
league: team > country = ground land
    {} competes in the league of
    At cup finals, {} stands for
    The anthem before {} matches is that of
    {} is licensed by
cradle: book > city = writer hometown
    The author of {} spent a childhood in
    Pilgrims who love {} travel to
    The opening of {} remembers
    A statue honours {} in
purse: city > coin = land money
    Shopkeepers in {} take the
    Rents in {} are quoted by the
    Beggars in {} hope for the
    Fares in {} cost one
speech: city > language = land tongue
    Street signs in {} are painted in
    Sermons in {} are held in
    Children in {} sing in
    Lawyers in {} argue in
"""
"""A relation a block: name, kind of its subjects > kind of its objects, and what it is composed of, if it is."""


@dataclass(frozen=True)
class Relation:
    """A functional relation. Every wording holds `{}` for the subject and ends where the object begins."""

    name: str
    subjects: str
    objects: str
    wordings: tuple[str, ...]
    path: tuple[str, ...] = ()
    """Relations that it is composed of, the first one applied first; none for a relation of its own."""


def read_relations(table: str = TABLE) -> tuple[Relation, ...]:
    """The relations of a table, in its order."""
    blocks: list[list[str]] = []
    for line in table.strip().splitlines():
        if line.startswith(" "):
            blocks[-1].append(line.strip())
        else:
            blocks.append([line])
    return tuple(_relation(*block) for block in blocks)


def _relation(head: str, *wordings: str) -> Relation:
    name, _, rest = head.partition(": ")
    kinds, _, path = rest.partition(" = ")
    subjects, _, objects = kinds.partition(" > ")
    return Relation(name, subjects, objects, wordings, tuple(path.split()))


RELATIONS = read_relations()
BASE = tuple(one for one in RELATIONS if not one.path)
DERIVED = tuple(one for one in RELATIONS if one.path)
BY_NAME = {one.name: one for one in RELATIONS}
