//! As much of XML as gateways' descriptions and SOAP take to be read: elements by local name, and their text.
//!
//! A scanner of our own rather than a crate: what gateways send is often not well-formed (stray bytes, unescaped
//! ampersands, missing end tags), and all that is wanted of it is a handful of texts. Namespaces, attributes, comments,
//! processing instructions and document types are skipped, and entities other than the five that XML defines stay as they
//! are: nothing here expands, recurses or fetches.

use std::borrow::Cow;

/// One piece of a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Piece<'a> {
    /// An element begins; its name without a namespace's prefix.
    Open(&'a str),
    /// An element ends.
    Close(&'a str),
    /// Text, entities resolved, without white space around it; never empty.
    Text(Cow<'a, str>),
}

/// Walks over a document. Ends at the first thing that makes no sense.
#[derive(Debug, Clone)]
pub(crate) struct Pieces<'a> {
    rest: &'a str,
    /// An empty-element tag was just told as open.
    close: Option<&'a str>,
}

impl<'a> Pieces<'a> {
    pub(crate) const fn of(document: &'a str) -> Self {
        Self { rest: document, close: None }
    }

    /// Goes on behind `end`; to the end of the document if there is none.
    fn skip_past(&mut self, end: &str) {
        self.rest = self.rest.find(end).map_or("", |at| &self.rest[at + end.len()..]);
    }

    fn tag(&mut self) -> Option<Piece<'a>> {
        let end = tag_end(self.rest)?;
        let inside = &self.rest[1..end];
        self.rest = &self.rest[end + 1..];
        if let Some(name) = inside.strip_prefix('/') {
            return Some(Piece::Close(local(name)));
        }
        let name = local(inside);
        if inside.ends_with('/') {
            self.close = Some(name);
        }
        Some(Piece::Open(name))
    }
}

impl<'a> Iterator for Pieces<'a> {
    type Item = Piece<'a>;

    fn next(&mut self) -> Option<Piece<'a>> {
        if let Some(name) = self.close.take() {
            return Some(Piece::Close(name));
        }
        loop {
            if self.rest.is_empty() {
                return None;
            }
            if let Some(rest) = self.rest.strip_prefix("<![CDATA[") {
                let end = rest.find("]]>").unwrap_or(rest.len());
                let text = rest[..end].trim();
                self.rest = rest.get(end + 3..).unwrap_or_default();
                if !text.is_empty() {
                    return Some(Piece::Text(Cow::Borrowed(text)));
                }
            } else if self.rest.starts_with("<!--") {
                self.skip_past("-->");
            } else if self.rest.starts_with("<?") {
                self.skip_past("?>");
            } else if self.rest.starts_with("<!") {
                self.skip_past(">");
            } else if self.rest.starts_with('<') {
                return self.tag();
            } else {
                let end = self.rest.find('<').unwrap_or(self.rest.len());
                let text = self.rest[..end].trim();
                self.rest = &self.rest[end..];
                if !text.is_empty() {
                    return Some(Piece::Text(unescape(text)));
                }
            }
        }
    }
}

/// Where the tag that `text` begins with ends; a `>` within an attribute's quotes does not count.
fn tag_end(text: &str) -> Option<usize> {
    let mut quote = None;
    text.bytes().enumerate().find_map(|(at, byte)| {
        match (quote, byte) {
            (None, b'>') => return Some(at),
            (None, b'"' | b'\'') => quote = Some(byte),
            (Some(open), close) if open == close => quote = None,
            _ => {}
        }
        None
    })
}

/// The local part of the name that a tag begins with.
fn local(inside: &str) -> &str {
    let end = inside.find(|c: char| c.is_ascii_whitespace() || c == '/').unwrap_or(inside.len());
    let name = &inside[..end];
    name.rsplit_once(':').map_or(name, |(_, local)| local)
}

fn unescape(text: &str) -> Cow<'_, str> {
    if !text.contains('&') {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('&') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let known = [("&amp;", '&'), ("&lt;", '<'), ("&gt;", '>'), ("&quot;", '"'), ("&apos;", '\'')];
        match known.iter().find(|(entity, _)| rest.starts_with(entity)) {
            Some((entity, character)) => {
                out.push(*character);
                rest = &rest[entity.len()..];
            }
            None => {
                out.push('&');
                rest = &rest[1..];
            }
        }
    }
    out.push_str(rest);
    Cow::Owned(out)
}

/// `text` as it stands in an element.
pub(crate) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// The text of the first element named `name`; none if there is no such element, or no text in it.
pub(crate) fn text_of<'a>(document: &'a str, name: &str) -> Option<Cow<'a, str>> {
    let mut pieces = Pieces::of(document);
    pieces.find(|piece| matches!(piece, Piece::Open(found) if *found == name))?;
    match pieces.next()? {
        Piece::Text(text) => Some(text),
        Piece::Open(_) | Piece::Close(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn shown(document: &str) -> String {
        let shown = Pieces::of(document).map(|piece| match piece {
            Piece::Open(name) => format!("+{name}"),
            Piece::Close(name) => format!("-{name}"),
            Piece::Text(text) => format!("={text}"),
        });
        shown.collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn elements_lose_prefixes_and_attributes() {
        assert_eq!(shown("<?xml version=\"1.0\"?><s:a x='1>2' y=\"'\"><b/>hi</s:a>"), "+a +b -b =hi -a");
    }

    #[test]
    fn comments_and_document_types_are_skipped_and_cdata_is_text() {
        assert_eq!(shown("<!DOCTYPE x><!-- <a> --><b><![CDATA[1 < 2]]></b>"), "+b =1 < 2 -b");
    }

    #[test]
    fn the_five_entities_are_resolved_and_no_others() {
        assert_eq!(shown("<a>&lt;&amp;&gt;&quot;&apos; &x; &</a>"), "+a =<&>\"' &x; & -a");
        assert_eq!(text_of(&format!("<a>{}</a>", escape("<\"&>")), "a").unwrap(), "<\"&>");
    }

    #[test]
    fn a_text_is_that_of_its_own_element() {
        let document = "<r><NewPort></NewPort><NewName>x</NewName></r>";
        assert_eq!(text_of(document, "NewName").unwrap(), "x");
        assert_eq!(text_of(document, "NewPort"), None);
        assert_eq!(text_of(document, "r"), None);
    }

    #[test]
    fn what_is_cut_short_ends() {
        for document in ["<", "<a", "<a x='", "<!--", "<![CDATA[", "<?", "</", "a<b"] {
            assert!(Pieces::of(document).count() <= 1, "{document}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_walked_to_its_end(document in "[<>/!?\\[\\]CDATA\\-&;a: '\"é]{0,60}") {
            prop_assert!(Pieces::of(&document).count() <= document.len() + 1);
        }
    }
}
