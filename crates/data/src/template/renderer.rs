//! A template at work on a source.

use super::compiled::ChatTemplate;
use super::context;
use super::options::TemplateOptions;
use super::proof::{Chat, Setup};
use super::shape::Plans;
use super::spans::prove;
use crate::example::Conversation;
use crate::policy::Policy;
use crate::render::Stops;
use crate::{Result, RowId};
use std::sync::Arc;

/// A chat template at work on a whole source: with the policy, the stop texts and the options that hold for all of
/// its rows, and what their shapes taught about the template. May be used from many threads; what becomes of
/// a row does not depend on the rows before it.
#[derive(Debug)]
pub struct ChatRenderer {
    setup: Setup,
    /// Today, where the template writes the date and the options name none.
    today: Option<jiff::civil::Date>,
    plans: Plans,
}

impl ChatRenderer {
    /// A template at work. Where the options name no date, it is today's, for all rows.
    pub fn new(
        template: impl Into<Arc<ChatTemplate>>,
        policy: impl Into<Arc<Policy>>,
        stops: &Stops,
        options: &TemplateOptions,
    ) -> ChatRenderer {
        let (template, policy) = (template.into(), policy.into());
        let today = (options.date.is_none() && template.writes_date()).then(|| jiff::Zoned::now().date());
        let options = TemplateOptions { date: options.date.or(today), kwargs: options.kwargs.clone() };
        let variables = template.variables(&options);
        let setup = Setup { template, policy, stops: stops.clone(), variables };
        ChatRenderer { setup, today, plans: Plans::default() }
    }

    /// The template.
    pub fn template(&self) -> &ChatTemplate {
        &self.setup.template
    }

    /// The day that the template is told, where it asks and the options name none: it decides what the rows
    /// become, as if it had been pinned.
    pub fn today(&self) -> Option<jiff::civil::Date> {
        self.today
    }

    /// A conversation as text with spans, by proof.
    ///
    /// # Errors
    /// [`Error::Row`] where the template refuses the conversation, and where there is no proof.
    pub fn spans(&self, id: RowId, c: &Conversation) -> Result<Chat> {
        let plan = self.plans.get(&self.setup, c);
        // A rendering with the marks of the blocks has the plain one in it: one rendering for both.
        if !self.setup.template.compiled(c).captures
            && let Some(plan) = plan.as_ref().filter(|plan| plan.is_marked())
        {
            let messages: Vec<minijinja::Value> = c.messages.iter().map(context::message).collect();
            if let Some(chat) = plan.apply(&self.setup, &id, c, &messages, None) {
                return Ok(chat);
            }
            return self.prove(id, c);
        }
        let (messages, text) = self.setup.plain(&id, c)?;
        match plan.and_then(|plan| plan.apply(&self.setup, &id, c, &messages, Some(&text))) {
            Some(chat) => Ok(chat),
            None => prove(&self.setup, id, c, messages, text),
        }
    }

    /// As [`ChatRenderer::spans`], from this conversation alone, without a look at its shape: slower, and the same wherever
    /// both have a proof.
    ///
    /// # Errors
    /// As [`ChatRenderer::spans`].
    pub fn prove(&self, id: RowId, c: &Conversation) -> Result<Chat> {
        let (messages, text) = self.setup.plain(&id, c)?;
        prove(&self.setup, id, c, messages, text)
    }
}
