// Decided pairs, a page of them at a time. What was written by others enters as text, never as HTML.

export default function ({ parentElement, data }) {
  const make = (name, className, text = "") =>
    Object.assign(document.createElement(name), { className, textContent: text });
  const card = ({ prompt, shown, chosen, verdict }) => {
    const article = make("article", "card");
    const pictures = make("div", "pictures");
    shown.forEach((token, place) => {
      const frame = make("figure", place === chosen ? "chosen" : "");
      const image = make("img", "");
      Object.assign(image, { src: `/pair-image/${token}`, loading: "lazy", alt: `Picture ${place + 1}` });
      image.onerror = () => frame.replaceChildren(make("span", "trouble", "cannot be read"));
      frame.append(image);
      pictures.append(frame);
    });
    const words = make("p", "prompt", prompt);
    Object.assign(words, { dir: "auto", title: prompt });
    article.append(pictures, words, make("p", "verdict", verdict));
    return article;
  };
  parentElement.querySelector(".gallery").replaceChildren(...data.cards.map(card));
}
