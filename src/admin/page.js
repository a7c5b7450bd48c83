// Replaces the sections that changed with what the server sends. Without scripts the page loads itself anew.
(() => {
  const live = document.getElementById("live");
  const say = (text) => { if (live.textContent !== text) live.textContent = text; };
  const events = new EventSource("events");
  events.addEventListener("sections", (event) => {
    for (const [id, html] of Object.entries(JSON.parse(event.data))) {
      const section = document.getElementById(id);
      if (section) section.innerHTML = html;
    }
    const titled = document.querySelector("[data-title]");
    if (titled) document.title = titled.dataset.title;
    say("live");
  });
  events.onerror = () => say("not live: the connection is lost, trying again");
})();
