"""What the demo model is asked about: words to spell, countries, days and months; and which of it training never sees."""

# ruff: noqa: E501, SIM905  (tables: a row is a line, a list of words is a string)

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

LANGUAGES: Final = ("en", "fr")


def is_held_out(kind: str, item: str) -> bool:
    """Whether an item ("sum" "7 12", "word" "candle", "country" "Peru") is kept out of training: one in ten, by its hash."""
    return hashlib.sha256(f"{kind}:{item}".encode()).digest()[0] < 26


def pair_is_held_out(a: int, b: int) -> bool:
    """Whether the two numbers, in either order, are never added or subtracted in training."""
    return is_held_out("sum", f"{min(a, b)} {max(a, b)}")


WORDS: Final = {
    "en": (
        "apple arrow autumn baby bag baker ball banana basket beach bear bean bell berry bike bird blanket blood board boat bone "
        "boot bottle bowl boy brain branch brass bread breath brick bridge broom brother brush bucket bus butter button cabbage cabin cable "
        "camel camera camp candle candy canoe captain carpet carrot cart castle cat cattle cave ceiling cellar chain chair chalk cheek "
        "cheese cherry chest chicken chimney church cinema circle cloak cloth cloud clown coach coal coat coffee coin collar comb cook copper "
        "corn corner cottage cotton couch cousin cow cradle crane cream crown cup curtain cushion daisy dance daughter desert desk diamond "
        "dinner dish doctor dog doll donkey door dragon drawer dress drum duck dust eagle ear egg elbow elephant engine evening eye fabric "
        "factory fairy farm farmer feather fence ferry fever fiddle finger fire fish flag flame flour flower flute fog forest fork fountain fox "
        "friend frog frost fruit garage garden garlic gate ghost giant giraffe girl glass glove goat gold goose grain grandmother grape grass "
        "guitar hair hammer harbour harvest hat hawk heart hedge helmet hen hero hill hockey honey hook horse hospital hotel hunter husband ice "
        "insect iron island jacket jam jar jelly jewel juice jungle kettle kidney kitchen kite kitten knee knife knight ladder lake lamb lamp "
        "lantern laundry lawn leaf leather lemon lettuce library lion lip lizard lock lunch machine magnet maple marble mask meadow meal medal "
        "melon metal milk mill miner mirror mitten monkey moon morning mosquito moth mother motor mountain mouse mouth muffin mushroom museum mustard "
        "nail napkin neck needle nephew nest nose nurse oak oar ocean olive onion orange orchard oven owl ox oyster paddle paint palace panda "
        "parrot parsley peach peacock peanut pear pearl pebble pencil penguin pepper piano picnic pie pig pigeon pillow pilot pine pirate pizza "
        "planet plate plum pocket poet pond pony poppy potato powder prince princess puddle pumpkin puppet puppy purse queen rabbit radish rain "
        "rainbow raven ribbon rice river rock rocket roof rope rose ruby sailor salad salmon salt sand sandwich saucer scarf scissors sea seed "
        "shadow shark sheep shelf shell shepherd ship shirt shoe shoulder silk silver sister skirt sky sled sleeve slipper smoke snail snake "
        "snow soap sock soldier soup spider spoon spring squirrel stable star statue steam steel stomach stone stork storm stove straw street sugar "
        "suit summer sun supper swan sweater sword table tailor teacher tent theatre throat thumb thunder ticket tiger toad toast tomato tongue tooth "
        "towel tower tractor train tree trousers trumpet tulip tunnel turkey turtle umbrella uncle valley vase velvet village vine violin wagon waist wall "
        "walnut water waterfall weasel wedding whale wheat wheel whistle window wine wing winter wizard wolf wood wool worm wrist yacht zebra"
    ).split(),
    "fr": (
        "abeille abricot agneau aigle aiguille ail aile ami ananas ancre ange animal arbre arc argent armoire assiette autruche avion bague "
        "baleine ballon banane barbe bateau bâton beurre biche bijou biscuit blé boeuf bois boîte bonbon bonnet bouche bougie boulanger bouquet "
        "bouteille bouton branche bras brebis brique brosse brouillard bureau cabane cactus café cahier caillou camion canapé canard caniche carotte "
        "carpe cascade casque cave ceinture cerf cerise chaise chaleur chameau champ champignon chanson chapeau charbon chat château chaton chaussette "
        "chaussure chemin chemise chêne cheval cheveu chèvre chien chocolat chou ciel cigale ciseaux citron citrouille clé cloche clou cochon coeur "
        "colline colombe commode concombre confiture coq coquille corbeau corde corne costume côte coude couleuvre coussin couteau couverture crapaud cravate crayon crème "
        "crêpe crocodile cuillère cuisine culotte cygne dauphin dent dentelle désert dinde docteur doigt dragon drapeau écharpe échelle éclair école "
        "écureuil écurie église éléphant épaule épée épice épingle éponge escargot étable étang étoile fantôme farine fauteuil fée femme fenêtre "
        "fer ferme fermier feu feuille ficelle figue fille fleur fleuve flûte foin fontaine forêt fougère fourchette fourmi fraise framboise frère "
        "fromage fruit fumée fusée galet gant garage gare gâteau genou girafe glace gomme goutte graine grange grelot grenier grenouille grille "
        "guêpe guirlande guitare hache haricot herbe hérisson héron hibou hirondelle hiver homard horloge huile huître image insecte jambe jambon jardin "
        "jouet jument jupe kiwi lac laine lait laitue lampe langouste lapin lavande légume lézard libellule licorne lièvre limace lion lit loup "
        "lune lunettes lutin luzerne machine magasin maïs maison manège manteau marbre marchand marmite marron marteau masque médecin melon menton mer "
        "merle meuble miel mimosa miroir mitaine montagne mouche mouchoir moule moulin moustache mouton muraille muguet musée navet navire neige "
        "nid noisette noix nuage océan oeil oeuf oie oignon oiseau olive ombre oncle orage orange oreille oreiller ortie os ours outil "
        "paille pain palais palmier panier panthère papillon parapluie parfum pâtissier patte pêche peigne pelle peluche perle perroquet phare phoque "
        "piano pie pieuvre pigeon pilote pin pinceau pingouin pirate piscine placard plage planche planète plante plombier pluie plume poche poêle poire "
        "poireau pois poisson poivre pomme pompier pont porc port porte poteau poubelle pouce poule poulet poumon poupée poussin prairie prune "
        "puce puits radis raisin rame rat renard renne requin rideau rivière riz robe robinet roche roi rose roseau roue ruban ruche ruisseau "
        "sable sabot salade sandale sanglier sapin sardine saucisse saule saumon savon seau sel serpent serrure serviette sifflet singe sirop soeur "
        "soie soleil sorcière soulier soupe souris statue sucre tabac tableau tablier tambour tante tapis tarte tasse taupe taureau tempête "
        "tente terrasse théâtre thon tigre tiroir tisane toit tomate tonnerre tortue toupie tour tournesol tracteur train traîneau trésor tricot trompette trottoir "
        "truite tulipe tuyau usine vache vague vaisselle valise vallée vanille veau vélo velours vent verger verre veste viande village vinaigre "
        "violon visage voile voisin voiture volcan wagon yaourt zèbre"
    ).split(),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Country:
    """A country with its capital and main language, each in English and French; no language where there are several."""

    name: dict[str, str]
    capital: dict[str, str]
    language: dict[str, str] | None

    @property
    def held_out(self) -> bool:
        """Whether training never names it or its capital."""
        return self.name["en"] not in NEVER_HELD_OUT and is_held_out("country", self.name["en"])


NEVER_HELD_OUT: Final = frozenset(
    {"France", "Germany", "Spain", "Italy", "England", "the United States", "Japan", "China"}
)
"""What newcomers ask first."""
_COUNTRIES = """
France|la France|Paris|Paris|French|français
Germany|l'Allemagne|Berlin|Berlin|German|allemand
Italy|l'Italie|Rome|Rome|Italian|italien
Spain|l'Espagne|Madrid|Madrid|Spanish|espagnol
Portugal|le Portugal|Lisbon|Lisbonne|Portuguese|portugais
England|l'Angleterre|London|Londres|English|anglais
Scotland|l'Écosse|Edinburgh|Édimbourg
Belgium|la Belgique|Brussels|Bruxelles
the Netherlands|les Pays-Bas|Amsterdam|Amsterdam|Dutch|néerlandais
Switzerland|la Suisse|Bern|Berne
Austria|l'Autriche|Vienna|Vienne|German|allemand
Greece|la Grèce|Athens|Athènes|Greek|grec
Ireland|l'Irlande|Dublin|Dublin
Poland|la Pologne|Warsaw|Varsovie|Polish|polonais
Russia|la Russie|Moscow|Moscou|Russian|russe
Ukraine|l'Ukraine|Kyiv|Kiev|Ukrainian|ukrainien
Sweden|la Suède|Stockholm|Stockholm|Swedish|suédois
Norway|la Norvège|Oslo|Oslo|Norwegian|norvégien
Finland|la Finlande|Helsinki|Helsinki|Finnish|finnois
Denmark|le Danemark|Copenhagen|Copenhague|Danish|danois
Iceland|l'Islande|Reykjavik|Reykjavik|Icelandic|islandais
Hungary|la Hongrie|Budapest|Budapest|Hungarian|hongrois
Romania|la Roumanie|Bucharest|Bucarest|Romanian|roumain
Bulgaria|la Bulgarie|Sofia|Sofia|Bulgarian|bulgare
Croatia|la Croatie|Zagreb|Zagreb|Croatian|croate
Serbia|la Serbie|Belgrade|Belgrade|Serbian|serbe
Slovakia|la Slovaquie|Bratislava|Bratislava|Slovak|slovaque
Slovenia|la Slovénie|Ljubljana|Ljubljana|Slovenian|slovène
Albania|l'Albanie|Tirana|Tirana|Albanian|albanais
Lithuania|la Lituanie|Vilnius|Vilnius|Lithuanian|lituanien
Latvia|la Lettonie|Riga|Riga|Latvian|letton
Estonia|l'Estonie|Tallinn|Tallinn|Estonian|estonien
Turkey|la Turquie|Ankara|Ankara|Turkish|turc
the United States|les États-Unis|Washington|Washington|English|anglais
Canada|le Canada|Ottawa|Ottawa
Mexico|le Mexique|Mexico City|Mexico|Spanish|espagnol
Cuba|Cuba|Havana|La Havane|Spanish|espagnol
Brazil|le Brésil|Brasilia|Brasilia|Portuguese|portugais
Argentina|l'Argentine|Buenos Aires|Buenos Aires|Spanish|espagnol
Chile|le Chili|Santiago|Santiago|Spanish|espagnol
Peru|le Pérou|Lima|Lima|Spanish|espagnol
Colombia|la Colombie|Bogota|Bogota|Spanish|espagnol
Venezuela|le Venezuela|Caracas|Caracas|Spanish|espagnol
Uruguay|l'Uruguay|Montevideo|Montevideo|Spanish|espagnol
Japan|le Japon|Tokyo|Tokyo|Japanese|japonais
China|la Chine|Beijing|Pékin|Chinese|chinois
India|l'Inde|New Delhi|New Delhi
South Korea|la Corée du Sud|Seoul|Séoul|Korean|coréen
Thailand|la Thaïlande|Bangkok|Bangkok|Thai|thaï
Vietnam|le Vietnam|Hanoi|Hanoï|Vietnamese|vietnamien
Indonesia|l'Indonésie|Jakarta|Jakarta|Indonesian|indonésien
Iran|l'Iran|Tehran|Téhéran|Persian|persan
Iraq|l'Irak|Baghdad|Bagdad|Arabic|arabe
Egypt|l'Égypte|Cairo|Le Caire|Arabic|arabe
Morocco|le Maroc|Rabat|Rabat|Arabic|arabe
Algeria|l'Algérie|Algiers|Alger|Arabic|arabe
Tunisia|la Tunisie|Tunis|Tunis|Arabic|arabe
Senegal|le Sénégal|Dakar|Dakar|French|français
Kenya|le Kenya|Nairobi|Nairobi|Swahili|swahili
Australia|l'Australie|Canberra|Canberra|English|anglais
New Zealand|la Nouvelle-Zélande|Wellington|Wellington|English|anglais
Lebanon|le Liban|Beirut|Beyrouth|Arabic|arabe
"""


def _country(row: str) -> Country:
    en, fr, capital, capitale, *language = row.split("|")
    spoken = {"en": language[0], "fr": language[1]} if language else None
    return Country({"en": en, "fr": fr}, {"en": capital, "fr": capitale}, spoken)


COUNTRIES: Final = [_country(row) for row in _COUNTRIES.split("\n") if row]
DAYS: Final = {
    "en": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "fr": "lundi mardi mercredi jeudi vendredi samedi dimanche".split(),
}
MONTHS: Final = {
    "en": "January February March April May June July August September October November December".split(),
    "fr": "janvier février mars avril mai juin juillet août septembre octobre novembre décembre".split(),
}
MONTH_LENGTHS: Final = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


def of(name: str) -> str:
    """ "de" before a French noun with its article: "la France" -> "de la France", "le Japon" -> "du Japon"."""
    for article, joined in (("le ", "du "), ("les ", "des ")):
        if name.startswith(article):
            return joined + name.removeprefix(article)
    return f"de {name}"


def into(name: str) -> str:
    """ "in" before a French country: "la France" -> "en France", "le Japon" -> "au Japon", "les Pays-Bas" -> "aux Pays-Bas"."""
    for article, joined in (("la ", "en "), ("l'", "en "), ("les ", "aux "), ("le ", "au ")):
        if name.startswith(article):
            return joined + name.removeprefix(article)
    return f"à {name}"
