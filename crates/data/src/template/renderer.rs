//! Renders the conversations of a whole source.

use super::compiled::ChatTemplate;
use super::context;
use super::given::Forms;
use super::habits::Habits;
use super::options::TemplateOptions;
use super::proof::{Chat, Setup};
use super::shape::Plans;
use super::spans::prove;
use crate::example::Conversation;
use crate::policy::Policy;
use crate::render::Stops;
use crate::{Result, RowId};
use std::sync::Arc;

/// Renders conversations with a template, policy, stop texts and options that are the same for all rows of a
/// source.
///
/// It caches proofs by the shape of conversations. It may be used from many threads, and the result of a row
/// does not depend on the rows before it.
#[derive(Debug)]
pub struct ChatRenderer {
    setup: Setup,
    /// Today, if the template uses the date and the options set none.
    today: Option<jiff::civil::Date>,
    plans: Plans,
    forms: Forms,
}

impl ChatRenderer {
    /// A renderer for a source. Without a date in the options, today's date is used for all rows.
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
        let habits = Habits::of(&template, &variables);
        let setup = Setup { template, policy, stops: stops.clone(), variables, habits };
        ChatRenderer { setup, today, plans: Plans::default(), forms: Forms::default() }
    }

    /// The template.
    pub fn template(&self) -> &ChatTemplate {
        &self.setup.template
    }

    /// The current date, if renderings depend on it: the template uses the date and the options set none.
    pub fn today(&self) -> Option<jiff::civil::Date> {
        self.today
    }

    /// Renders a conversation and proves its spans.
    ///
    /// # Errors
    /// [`Error::Row`](crate::Error::Row) if the template rejects the conversation or there is no proof.
    pub fn spans(&self, id: RowId, c: &Conversation) -> Result<Chat> {
        let c = &*self.setup.habits.named(c);
        let c = &*self.setup.given(c, &self.forms);
        let plan = self.plans.get(&self.setup, c);
        // The rendering with marks around the blocks contains the plain one, so one rendering is enough.
        if !self.setup.template.compiled(c).captures
            && let Some(plan) = plan.as_ref().filter(|plan| plan.is_marked())
        {
            let messages: Vec<minijinja::Value> = c.messages.iter().map(context::message).collect();
            if let Some(chat) = plan.apply(&self.setup, &id, c, &messages, None) {
                return Ok(chat);
            }
            return self.proof(id, c);
        }
        let (messages, text) = self.setup.plain(&id, c)?;
        match plan.and_then(|plan| plan.apply(&self.setup, &id, c, &messages, Some(&text))) {
            Some(chat) => Ok(chat),
            None => prove(&self.setup, id, c, messages, text),
        }
    }

    /// As [`ChatRenderer::spans`], without the cache of proofs: slower, with the same result wherever both
    /// have a proof.
    ///
    /// # Errors
    /// As [`ChatRenderer::spans`].
    pub fn prove(&self, id: RowId, c: &Conversation) -> Result<Chat> {
        let c = &*self.setup.habits.named(c);
        self.proof(id, &self.setup.given(c, &self.forms))
    }

    /// The proof for a conversation in the form that the template supports.
    fn proof(&self, id: RowId, c: &Conversation) -> Result<Chat> {
        let (messages, text) = self.setup.plain(&id, c)?;
        prove(&self.setup, id, c, messages, text)
    }
}
