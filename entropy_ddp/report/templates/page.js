(() => {
  "use strict";
  const tip = document.getElementById("tip");
  const names = ["position", "share", "log p", "entropy", "covariance score"];
  let active = null;
  const isToken = (node) => node instanceof Element && node.matches("[data-n]");

  function rows(token) {
    const values = token.dataset.n.split("|");
    const unit = token.closest(".texts").dataset.unit;
    const found = names.map((name, place) => [name, values[place]]);
    found[1][1] += " " + unit;
    found[2][1] += " nats";
    found[3][1] += " nats";
    found.splice(4, 0, ["advantage", token.closest(".tokens").dataset.advantage]);
    return [["token", token.textContent], ...found];
  }

  function show(token) {
    const table = document.createElement("table");
    for (const [name, value] of rows(token)) {
      const row = table.insertRow();
      const head = document.createElement("th");
      head.scope = "row";
      head.textContent = name;
      row.append(head);
      row.insertCell().textContent = value;
    }
    tip.replaceChildren(table);
    tip.hidden = false;
    active = token;
    active.setAttribute("aria-describedby", "tip");
    stayBeside();
  }

  function stayBeside() {
    if (!active) return;
    const place = active.getBoundingClientRect();
    const left = Math.min(place.left, innerWidth - tip.offsetWidth - 8);
    const above = place.top - tip.offsetHeight - 8;
    tip.style.left = Math.max(8, left) + "px";
    tip.style.top = (above >= 8 ? above : place.bottom + 8) + "px";
  }

  function hide() {
    tip.hidden = true;
    if (active) active.removeAttribute("aria-describedby");
    active = null;
  }

  function onEnter(event) {
    hide();
    if (isToken(event.target)) show(event.target);
  }

  // One stop of the Tab key for each text, at its strongest token; arrows go on from it.
  for (const text of document.querySelectorAll(".tokens")) {
    const strength = (token) => Number(token.style.getPropertyValue("--a"));
    const tokens = [...text.querySelectorAll("[data-n]")];
    if (tokens.length) {
      tokens.reduce((a, b) => (strength(b) > strength(a) ? b : a)).tabIndex = 0;
    }
    text.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const next = tokens[tokens.indexOf(event.target) + step];
      if (step === undefined || next === undefined) return;
      event.preventDefault();
      event.target.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
  }

  // When the page scrolls under a pointer at rest, the pointer asks for nothing.
  let pointer = "";
  const placeOf = (event) => `${event.screenX} ${event.screenY}`;
  document.addEventListener("mouseover", (event) => {
    if (placeOf(event) !== pointer) onEnter(event);
  });
  document.addEventListener("mousemove", (event) => {
    pointer = placeOf(event);
  });
  for (const kind of ["focusin", "click"]) document.addEventListener(kind, onEnter);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
  });
  for (const kind of ["scroll", "resize"]) {
    addEventListener(kind, stayBeside, { passive: true });
  }

  // A link to something folded opens it.
  addEventListener("hashchange", () => {
    const target = document.getElementById(location.hash.slice(1));
    if (target instanceof HTMLDetailsElement) target.open = true;
  });
})();
