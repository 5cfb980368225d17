"""Opens the pages that suasion writes in headless Chromium, and checks what only a browser can show.

    python tests/pages.py PAGE.html... [--shots FOLDER]

Every page is opened at 390 and 1280 px, light and dark, printed, and with JavaScript off. Nothing may be loaded, no
script but the page's own may run, whatever is in the rows; nothing may need sideways scrolling; text must have contrast.
With --shots the screens are kept as PNG, and the print as PDF. Needs playwright and /usr/bin/chromium (or CHROMIUM).
"""

import argparse
import os
import pathlib

from playwright.sync_api import expect, sync_playwright

# Runs before the page: records what the page must not do.
WATCH = """
window.__violations = [];
document.addEventListener('securitypolicyviolation', e => window.__violations.push(e.violatedDirective + ' ' + e.blockedURI));
for (const name of ['alert', 'confirm', 'prompt']) window[name] = () => { window.pwned = name; };
"""

CONTRAST = """
() => {
  const parse = text => { const m = text.match(/[\\d.]+/g).map(Number); return [m[0], m[1], m[2], m.length > 3 ? m[3] : 1]; };
  const linear = v => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
  const luminance = c => 0.2126 * linear(c[0]) + 0.7152 * linear(c[1]) + 0.0722 * linear(c[2]);
  const background = node => {
    for (let at = node; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      if (color[3] === 1) return color;
    }
    return [255, 255, 255, 1];
  };
  const low = [];
  const seen = new Set();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || seen.has(element) || ['SCRIPT', 'STYLE', 'OPTION', 'title'].includes(element.tagName)) continue;
    seen.add(element);
    if (!element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    const ink = parse(element.ownerSVGElement ? style.fill : style.color);
    const a = luminance(ink), b = luminance(background(element));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    if (ratio < (large ? 3 : 4.5)) low.push(`${ratio.toFixed(2)} ${element.tagName}.${element.className} ${node.data.trim().slice(0, 30)}`);
  }
  return low;
}
"""

# Words of prose that a line break splits. Code, tokens and names of files may break anywhere.
BROKEN = """
() => {
  const broken = [];
  const free = '.flow, .text, .tokens, .place, .found, .facts td, pre, code, header, select, script, style, svg';
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    if (!node.data.trim() || node.parentElement.closest(free) || !node.parentElement.checkVisibility()) continue;
    for (const match of node.data.matchAll(/[\\p{L}\\d]+/gu)) {
      const range = document.createRange();
      range.setStart(node, match.index);
      range.setEnd(node, match.index + match[0].length);
      if (match[0].length < 24 && range.getClientRects().length > 1) broken.push(match[0]);
    }
  }
  return broken;
}
"""

STRUCTURE = """
() => {
  const all = selector => [...document.querySelectorAll(selector)];
  const wrong = [];
  const ids = all('[id]').map(one => one.id);
  if (new Set(ids).size !== ids.length) wrong.push('ids that occur twice');
  if (all('h1').length !== 1) wrong.push('not one h1');
  if (all('script').length !== 1) wrong.push('scripts: ' + all('script').length);
  for (const one of all('img, iframe, object, embed, base, link, video, audio, input, textarea, math, marquee, a[target]')) wrong.push('element ' + one.outerHTML.slice(0, 80));
  for (const one of all('*')) for (const attribute of one.attributes) {
    if (attribute.name.startsWith('on') || attribute.name === 'style' || attribute.name === 'src') wrong.push(`attribute ${attribute.name} of ${one.tagName}`);
  }
  for (const one of all('a')) {
    if (!one.getAttribute('href').startsWith('#')) wrong.push('link ' + one.getAttribute('href'));
    else if (!document.getElementById(one.getAttribute('href').slice(1))) wrong.push('link to nothing ' + one.hash);
  }
  for (const bar of all('.bar')) {
    const share = bar.previousElementSibling.textContent;
    if ((share === '0.0 %') !== (bar.children.length === 0)) wrong.push('bar of ' + share);
  }
  for (const text of all('figure text')) {
    if (!/^−?([\\d,]+(\\.\\d+)?[kMG]?|\\de-?\\d+)( .*)?$/.test(text.textContent)) wrong.push('axis number ' + text.textContent);
  }
  for (const select of all('select')) if (!select.closest('label')) wrong.push('a select without a label');
  return wrong;
}
"""


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("pages", nargs="+", type=pathlib.Path)
    parser.add_argument("--shots", type=pathlib.Path)
    args = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"))
        for path in args.pages:
            assert path.stat().st_size < 5_000_000, f"{path}: {path.stat().st_size} bytes"
            for width in (1280, 390):
                for scheme in ("light", "dark"):
                    look(browser, path, width, scheme, args.shots)
            without_scripts(browser, path)
            print(f"{path.name}: {path.stat().st_size} bytes, all checks passed")
        browser.close()


def opened(browser, path, **context):
    """The page in a context of its own, and what it has done that it must not."""
    context = browser.new_context(**context)
    context.add_init_script(WATCH)
    page = context.new_page()
    faults = []
    page.on("console", lambda message: faults.append(f"console {message.type}: {message.text}"))
    page.on("pageerror", lambda error: faults.append(f"error: {error}"))
    page.on("request", lambda request: faults.append(f"request: {request.url}"))
    page.goto(path.resolve().as_uri())
    # The page itself.
    assert faults and faults[0].startswith("request: file:"), faults
    del faults[0]
    return page, faults


def look(browser, path, width, scheme, shots):
    page, faults = opened(
        browser, path, viewport={"width": width, "height": 900}, color_scheme=scheme,
        permissions=["clipboard-read", "clipboard-write"],
    )
    where = f"{path.name} at {width} px, {scheme}"

    def none(found, what):
        assert not found, f"{where}: {what}: {found[:10]}"

    if shots:
        name = f"{path.stem}-{width}-{scheme}"
        page.screenshot(path=shots / f"{name}.png")
        page.screenshot(path=shots / f"{name}-whole.png", full_page=True)
    none(page.evaluate(STRUCTURE), "structure")

    def fits():
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"{where}: {wide} px wide"

    fits()
    # Everything opened: rows, explanations.
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    fits()
    none(page.evaluate(CONTRAST), "contrast")
    none(page.evaluate(BROKEN), "broken words")
    if shots:
        page.screenshot(path=shots / f"{name}-open.png", full_page=True, clip={"x": 0, "y": 0, "width": width, "height": 6000})
    page.evaluate("document.querySelectorAll('details.row').forEach((one, i) => { one.open = i === 0; })")

    if scheme == "light":
        clicks(page, where)
    # The pointer over everything that rows have written into the page, with all events that a handler could wait for.
    page.evaluate("""() => {
        for (const one of document.querySelectorAll('body *'))
            for (const type of ['mouseover', 'mouseenter', 'focus', 'load', 'error', 'toggle', 'animationstart'])
                one.dispatchEvent(new Event(type, { bubbles: type === 'mouseover' }));
    }""")
    assert page.evaluate("window.pwned === undefined"), f"{where}: a script of the data has run: {page.evaluate('window.pwned')}"
    none(page.evaluate("window.__violations"), "violations of the policy")
    if width == 1280 and scheme == "dark":
        printed(page, path, shots)
    none(faults, "messages")
    page.context.close()


def clicks(page, where):
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.click("#theme")
    assert page.evaluate(ground) != light, f"{where}: the theme does not change"
    page.click("#theme")
    assert page.evaluate(ground) == light, f"{where}: the theme does not change back"
    if command := page.query_selector(".command"):
        command.query_selector("button").click()
        expect(page.locator(".command button").first).not_to_have_text("Copy")
        copied = page.evaluate("navigator.clipboard.readText()")
        assert copied == command.query_selector("code").text_content(), f"{where}: copied {copied!r}"
    rows = page.locator("details.row")
    if rows.count() == 0:
        return
    shown = lambda: page.locator("details.row:not([hidden])").count()
    everything = shown()
    for name in ("codes", "sections", "tokens"):
        select = page.locator(f"select[name={name}]")
        if select.count() == 0:
            continue
        values = select.locator("option").evaluate_all("all => all.map(one => one.value)")
        for value in values[1:]:
            select.select_option(value)
            assert 0 < shown() <= everything, f"{where}: {name}={value} shows {shown()} rows"
        select.select_option("")
        assert shown() == everything
    if (link := page.locator("a[data-filter]").first).count():
        code = link.get_attribute("data-filter")
        link.click()
        kept = page.locator("details.row:not([hidden])").evaluate_all("all => all.map(one => one.dataset.codes)")
        assert kept and all(code in codes.split() for codes in kept), f"{where}: {code}: {kept}"
        page.locator(f"[id='{code}'] a[href^='#row-']").first.click()
        target = page.evaluate("location.hash.slice(1)")
        assert page.locator(f"[id='{target}']").get_attribute("open") is not None, f"{where}: {target} stays closed"
        page.locator("select[name=codes]").select_option("")
    keys(page, where)


def keys(page, where):
    focus = "document.activeElement"
    text = lambda: page.evaluate(f"({focus}.closest('.row')?.querySelector('.detail')?.textContent) ?? ''")
    page.locator("#theme").focus()
    page.evaluate("document.activeElement.blur()")
    page.evaluate("document.querySelectorAll('details.row').forEach(one => { one.open = false; })")
    page.keyboard.press("]")
    rows = []
    # Rows without tokens are passed over by the focus, not by the key.
    for _ in range(page.locator("details.row").count()):
        if page.evaluate(f"{focus}.localName") == "i":
            rows.append(page.evaluate(f"{focus}.closest('.row').id"))
        page.keyboard.press("]")
    assert len(set(rows)) == page.locator("details.row:has(i)").count(), f"{where}: ] reaches {rows}"
    page.keyboard.press("[")
    page.keyboard.press("Home")
    start = text()
    assert "token 0 " in start and " · id " in start, f"{where}: {start!r}"
    page.keyboard.press("ArrowRight")
    assert text() != start and "id " in text(), f"{where}: {text()!r}"
    described = page.evaluate(f"document.getElementById({focus}.getAttribute('aria-describedby')).textContent")
    assert described == text()
    page.keyboard.press("ArrowLeft")
    assert text() == start
    run = f"{focus}.closest('.run')"
    before = page.evaluate(f"[...{run}.parentElement.children].indexOf({run})")
    for down, up in (("j", "k"), ("ArrowDown", "ArrowUp")):
        page.keyboard.press(down)
        assert page.evaluate(f"[...{run}.parentElement.children].indexOf({run})") > before, f"{where}: {down}"
        page.keyboard.press(up)
        assert page.evaluate(f"[...{run}.parentElement.children].indexOf({run})") == before, f"{where}: {up}"
    page.keyboard.press("End")
    page.keyboard.press("Escape")
    assert page.evaluate(f"{focus}.localName") == "summary"


def printed(page, path, shots):
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).printColorAdjust") == "exact"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)", "paper is white"
    pdf = page.pdf(path=shots / f"{path.stem}.pdf" if shots else None, format="A4")
    assert pdf.startswith(b"%PDF") and len(pdf) > 10_000


def without_scripts(browser, path):
    page, faults = opened(browser, path, java_script_enabled=False, viewport={"width": 390, "height": 900})
    assert page.locator("h1").is_visible() and not page.locator("#theme").is_visible()
    assert page.locator(".filters").count() == 0 or not page.locator(".filters").is_visible()
    closed = page.locator("details.row:not([open])")
    if closed.count():
        # By its name: a locator of what is closed is another row's once this one is open.
        row = page.locator(f"[id='{closed.last.get_attribute('id')}']")
        row.locator("summary").click()
        assert row.locator(".place").is_visible()
    assert not faults, faults
    page.context.close()


if __name__ == "__main__":
    main()
